"""DTensors: what is made of their logits, and what a loss of plain tensors says to them."""

from typing import Any

from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    return type(tensor) is not Tensor and any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def served(loss: str, logits: Any, tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    """The loss of that name of DTensor logits by their shards; None where PyTorch's operators are to make it."""
    target = tensors["target"]
    if isinstance(target, Tensor) and target.is_floating_point():
        return None
    if any(isinstance(each, Tensor) for each in options.values()):
        return None
    from ..parallel import _placed

    return _placed.served(loss, logits, tensors, options)


def refuse_dtensor(function: str, name: str, tensor: Any, expected: str, remedy: str) -> None:
    if is_dtensor(tensor):
        raise RuntimeError(
            f"{function}: expected {name} to be {expected} on every rank, got a DTensor of placements "
            f"{tensor.placements}; pass {name}.{remedy}()"
        )
