"""What the softmax losses share: where the classes lie, the class indices, and the mean over rows."""

import torch
from torch import Tensor


def class_dim(logits: Tensor) -> int:
    return min(logits.dim() - 1, 1)


def class_index(target: Tensor) -> Tensor:
    """The class indices in int64, because some torch functions that take class indices do not take uint8."""
    return target.long() if isinstance(target, Tensor) and target.dtype == torch.uint8 else target


def reduced(losses: Tensor, divisor: Tensor, reduction: str, zero: bool) -> Tensor:
    """The losses reduced; a mean divides by ``divisor``. ``zero``: a mean over nothing is 0, not NaN."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # Divided by infinity, a mean over nothing is 0, and so is its gradient.
    return losses.sum() / (torch.where(divisor == 0, torch.inf, divisor) if zero else divisor)
