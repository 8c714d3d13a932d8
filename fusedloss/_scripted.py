"""What TorchScript compiles in place of the public functions, which call the extension: torch's own, or plain formulas.

They take what TorchScript has types for: no list of class weights, and no keyword that changes the type of the result.
The focal losses have the dtype of their input, under autocast too: TorchScript cannot be asked for autocast (torch 2.13
ends the process).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _torchs
from ._dtypes import in_float
from .losses._rows import class_dim, class_index, reduced
from .losses.focal import of_probabilities, of_rows
from .losses.sigmoid_focal import of_elements


def _check(gamma: float, reduction: str) -> None:
    if not gamma >= 0:
        raise ValueError("gamma must be at least 0")
    if reduction != "none" and reduction != "mean" and reduction != "sum":
        raise ValueError("not a valid value for reduction")


# A saved TorchScript cannot be loaded where an argument of several types is used after its type was asked for.
def _factor_and_weight(alpha: float | Tensor | None) -> tuple[float, Tensor | None]:
    if isinstance(alpha, Tensor):
        return 1.0, alpha
    if alpha is not None:
        return alpha, None
    return 1.0, None


def _divisor(normalizer: float | Tensor | None, reduction: str, count: Tensor) -> Tensor:
    if normalizer is None:
        return count if reduction == "mean" else torch.ones_like(count)
    if reduction != "mean":
        raise ValueError("normalizer needs reduction='mean', whose sum it divides")
    if isinstance(normalizer, Tensor):
        return normalizer.reshape([])
    return torch.full([], normalizer, dtype=torch.float64, device=count.device)


def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    _check(gamma, reduction)
    if sample_weight is not None:
        raise ValueError("TorchScript runs a focal loss that takes no sample_weight")
    x = in_float(input)
    factor, weight = _factor_and_weight(alpha)
    if weight is not None and (weight.dim() != 1 or weight.size(0) != x.size(class_dim(x))):
        raise ValueError("alpha must hold a weight for each class")
    if target.is_floating_point():
        if target.size() != input.size():
            raise ValueError("probabilities must be of the input's shape")
        tiny = 2.2250738585072014e-308 if x.dtype == torch.float64 else 1.1754943508222875e-38
        losses = of_probabilities(x, target, factor, weight, gamma, tiny)
        if reduction != "none":
            losses = losses.mean() if reduction == "mean" else losses.sum()
        return losses.to(input.dtype)
    index = class_index(target)
    kept = index != ignore_index
    lowest = -1.7976931348623157e308 if x.dtype == torch.float64 else -3.4028234663852886e38
    losses = of_rows(x, index, gamma, ignore_index, lowest)
    if weight is not None:
        losses = losses * weight.to(x.dtype)[torch.where(kept, index, 0).long()]
    losses = torch.where(kept, losses * factor, 0.0)
    return reduced(losses, kept.sum(), reduction, False).to(input.dtype)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    _check(gamma, reduction)
    x = in_float(inputs)
    kept = torch.ones([1], dtype=torch.bool, device=x.device)
    t = targets
    if targets.size() != inputs.size():
        if targets.is_floating_point() or x.dim() < 2 or targets.size() != inputs.select(1, 0).size():
            raise ValueError("targets must be of the inputs' size, or class indices of that size without the classes")
        index = targets.long()
        classes = x.size(1)
        kept = index != ignore_index
        index = torch.where(kept & (index >= 0), index, classes)
        if bool((index > classes).any()):
            raise IndexError("a class index is above the number of classes")
        columns = torch.arange(classes, device=x.device).view([-1] + [1] * (x.dim() - 2))
        t = index.unsqueeze(1) == columns
        kept = kept.unsqueeze(1)
    losses = of_elements(torch.where(kept, x, 0.0), t.to(x.dtype), alpha, gamma)
    if weight is not None:
        losses = losses * weight
    losses = torch.where(kept, losses, 0.0)
    divisor = _divisor(normalizer, reduction, kept.expand(losses.size()).sum())
    if reduction != "none":
        losses = losses.sum() / divisor
    return losses.to(inputs.dtype)


def log_probs(logits: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100) -> Tensor:
    if not temperature > 0:
        raise ValueError("temperature must be positive")
    x = in_float(logits) / temperature
    log_p = x.log_softmax(class_dim(x)).contiguous()
    return -_torchs.nll_loss(log_p, class_index(target), ignore_index=ignore_index, reduction="none")


_OWN: dict[str, Callable[..., Any]] = {
    "focal_loss": focal_loss,
    "log_probs": log_probs,
    "sigmoid_focal_loss": sigmoid_focal_loss,
}


def let_script(function: Callable[..., Any]) -> None:
    """Tells ``torch.jit.script`` what stands for a public function."""
    name = function.__name__
    native = _OWN.get(name) or getattr(_torchs, name, None)
    if native is not None:  # otherwise TorchScript says what it cannot compile
        function.__prepare_scriptable__ = lambda: native  # type: ignore[attr-defined]


def as_native(module: nn.Module, native_class: type[nn.Module]) -> nn.Module:
    """The module with torch's class in place of ours, because TorchScript cannot compile calls of the extension."""
    native = native_class.__new__(native_class)
    native.__dict__.update(module.__dict__)
    return native
