"""What the pointwise losses share: broadcasting with torch's warning, and the reduction."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _route
from .._warnings import warn


def reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction not in _route.REDUCTIONS:
        # torch's message for weighted losses, which refuse "elementwise_mean" too
        raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    return losses.mean() if reduction == "mean" else losses.sum()


def broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one size, so that torch does not warn a second time."""
    if input.size() == target.size():
        return input, target
    return torch.broadcast_tensors(input, target)  # type: ignore[return-value]


def warn_of_broadcasting(input: Tensor, target: Tensor, stacklevel: int = 3) -> None:
    """Warns as torch does where the sizes differ; the default stacklevel names the caller of a public loss."""
    if not is_compiling() and target.size() != input.size():  # a warning would break the graph
        warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=stacklevel,
        )


INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_broadcasts(name: str, factor: Tensor | None, input: Tensor) -> None:
    if factor is not None and not _route.broadcasts_to(factor.shape, input.shape):
        raise ValueError(f"{name} must broadcast to the inputs' size ({input.shape}), got ({factor.shape})")
