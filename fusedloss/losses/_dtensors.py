"""DTensors: what is made of their logits, and what a loss of plain tensors says to them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._rows import class_dim


def is_dtensor(tensor: Any) -> bool:
    kind = type(tensor)  # torch.compile does not look through the bases of a Parameter
    return kind is not Tensor and kind is not Parameter and any(each.__name__ == "DTensor" for each in kind.__mro__)


def served(loss: str, logits: Any, tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    """The loss of that name of DTensor logits by their shards; None where PyTorch's operators are to make it."""
    target = tensors["target"]
    if isinstance(target, Tensor) and target.is_floating_point():
        return None
    if any(isinstance(each, Tensor) for each in options.values()):
        return None
    from ..parallel import _placed

    return _placed.served(loss, logits, tensors, options)


def served_pointwise(loss: Callable[..., Any], formula: Callable[..., Any], *call: Any, **options: Any) -> Any:
    """A routed pointwise loss of DTensors by their shards; None where PyTorch's operators are to make it."""
    if not is_dtensor(call[0]):
        return None
    from ..parallel import _placed_pointwise

    return _placed_pointwise.served(loss, formula, *call, **options)


def served_divergence(call: Any, return_lse: bool) -> Any:
    """The divergence of a DTensor student by its shards; None where PyTorch's operators are to make it."""
    from ..parallel import _placed_divergence

    made = _placed_divergence.served(call, return_lse)
    if made is None:
        _refuse_in_loss_parallel(call.student, call.student.dim() - 1)
    return made


def refused_softmax(loss: Callable[..., Any], formula: Callable[..., Any], *call: Any, **options: Any) -> None:
    """Refuses what torch's loss_parallel would give silently wrong gradients: its handlers take the backward of any
    log-softmax for that of a cross-entropy."""
    if is_dtensor(call[0]):
        _refuse_in_loss_parallel(call[0], class_dim(call[0]))


def _refuse_in_loss_parallel(logits: Any, dim: int) -> None:
    aten = torch.ops.aten
    if not any(_cuts(logits, dim)):
        return
    if aten._log_softmax.default in getattr(type(logits)._op_dispatcher, "_custom_op_handlers", {}):
        raise RuntimeError(
            "expected logits whose classes are whole on every rank for a loss that runs in PyTorch's operators inside "
            f"loss_parallel, got a DTensor of placements {logits.placements}; leave loss_parallel, or pass DTensors of "
            "class indices and numbers for parameters to cross_entropy, focal_loss, log_probs or kl_divergence"
        )


def over_whole_classes(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of DTensor logits whose classes are cut gathers them first, as torch does in log_softmax: not each of
    torch's reductions takes a rank without classes."""

    def native(logits: Any, *rest: Any, **options: Any) -> Any:
        if is_dtensor(logits) and any(cut := _cuts(logits, class_dim(logits))):
            from torch.distributed.tensor import Replicate

            places = [Replicate() if yes else place for yes, place in zip(cut, logits.placements, strict=True)]
            logits = logits.redistribute(logits.device_mesh, places)
        return formula(logits, *rest, **options)

    return native


def _cuts(logits: Any, dim: int) -> list[bool]:
    """Whether each dimension of the mesh cuts that of the logits."""
    return [place.is_shard(dim) or place.is_shard(dim - logits.dim()) for place in logits.placements]


def refuse_dtensor(function: str, name: str, tensor: Any, expected: str, remedy: str) -> None:
    if is_dtensor(tensor):
        raise RuntimeError(
            f"{function}: expected {name} to be {expected} on every rank, got a DTensor of placements "
            f"{tensor.placements}; pass {name}.{remedy}()"
        )
