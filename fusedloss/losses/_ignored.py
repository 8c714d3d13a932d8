"""Which rows are ignored: those of one class index, of several, or of a mask; the kernels know one index."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._sizes import rows_of, same_shape
from ._rows import class_index

MASKED = -(2**31) + 1  # stands in the target of a masked row: a number that names no class, and that nobody writes

IgnoreIndex = int | Sequence[int] | Tensor


def is_one(ignore_index: Any) -> bool:
    """Whether it is one index, or something that torch refuses in its own words."""
    if isinstance(ignore_index, Tensor):
        return ignore_index.dtype != torch.bool
    return not isinstance(ignore_index, Sequence) or isinstance(ignore_index, str | bytes)


def with_one_index(
    function: str, input: Tensor | torch.Size, target: Tensor, ignore_index: Any, sample_weight: Tensor | None
) -> tuple[Tensor, Any, Tensor | None]:
    """The target, the one index and the weights of the rows that stand for several indices or a mask.

    ``input``: the logits, or the shape of their rows.
    """
    if isinstance(ignore_index, Tensor):
        return _masked(input, target, ignore_index, sample_weight)
    for index in ignore_index:
        if isinstance(index, bool) or not isinstance(index, int | torch.SymInt):
            raise TypeError(f"{function}(): argument 'ignore_index' must hold ints, got {type(index).__name__}")
    if not isinstance(target, Tensor) or target.is_floating_point():  # torch refuses an index from 0 on
        return target, max(ignore_index, default=MASKED), sample_weight
    first, *others = ignore_index or [MASKED]
    if others:
        target = class_index(target)  # a negative index is none of uint8
        ignored = target == others[0]
        for index in others[1:]:
            ignored = ignored | (target == index)
        target = target.masked_fill(ignored, first)
    return target, first, sample_weight


def _masked(
    input: Tensor | torch.Size, target: Tensor, mask: Tensor, sample_weight: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    if not isinstance(target, Tensor):
        return target, MASKED, sample_weight
    soft = target.is_floating_point()
    rows = target.shape if not soft else input if isinstance(input, torch.Size) else rows_of(input)
    if not same_shape(mask.shape, rows):
        raise ValueError(f"a mask of ignored rows must be of their shape {tuple(rows)}, got shape {tuple(mask.shape)}")
    if not soft:
        return class_index(target).masked_fill(mask, MASKED), MASKED, sample_weight
    if sample_weight is None:
        sample_weight = torch.where(mask, 0.0, 1.0)
    elif isinstance(sample_weight, Tensor) and same_shape(sample_weight.shape, rows):  # or else it is refused
        sample_weight = sample_weight.masked_fill(mask, 0)
    return target, MASKED, sample_weight
