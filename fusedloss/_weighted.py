"""Weights of rows, natively: what a softmax loss makes of a ``sample_weight``, stated over its native formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._captures import REDUCTIONS
from ._dtypes import in_float, widened
from ._sizes import rows_of, same_shape
from .losses._rows import class_dim, class_index, reduced


def over_weighted_rows(formula: Callable[..., Any], soft: bool, mean_by_weight: bool) -> Callable[..., Any]:
    """``formula(logits, target, weight, reduction, ignore_index, *params, **options)`` that takes ``sample_weight``.

    A row's loss l is multiplied by its weight s. The mean is sum(s l) / sum(s), or with ``mean_by_weight``
    sum(s l) / sum(s w_y), over the rows that are not ignored. A row of weight 0 is as an ignored one, whatever its
    logits. The second result is that of the formula.
    """

    def native(
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, *params: Any,
        sample_weight: Tensor | None = None, **options: bool,
    ) -> Any:  # fmt: skip
        if sample_weight is None:
            return formula(logits, target, weight, reduction, ignore_index, *params, **options)
        if not _fit(logits, target, sample_weight, soft):
            formula(logits, target, weight, "none", ignore_index, *params)  # torch names what it refuses first
        check(sample_weight, logits)
        if reduction not in REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        x, factor = in_float(logits), weight if weight is None else in_float(weight)
        dtype = x.dtype if widened(logits, options.get("wide", False)) else logits.dtype
        if soft:
            dtype, target, kept = torch.promote_types(dtype, target.dtype), in_float(target), None
        else:
            target = class_index(target)
            kept = target != ignore_index
        s = sample_weight.to(x.dtype)
        losses = weighted(x, s, kept, lambda x: formula(x, target, factor, "none", ignore_index, *params))
        of_class = None
        if mean_by_weight and factor is not None and kept is not None and reduction == "mean":
            of_class = factor.to(x.dtype)[torch.where(kept, target, 0)]
        loss = reduced_by_weight(losses, s, kept, of_class, reduction, options.get("zero", False)).to(dtype)
        if not options.get("second", False):
            return loss
        counting = target if soft else torch.where(s == 0, ignore_index, target)
        _, of_rows = formula(x, counting, factor, "none", ignore_index, *params, second=True)
        return loss, of_rows.to(dtype)

    return native


def _fit(logits: Any, target: Any, sample_weight: Any, soft: bool) -> bool:
    if not all(isinstance(each, Tensor) for each in (logits, target, sample_weight)):
        return False
    rows = rows_of(logits)
    return same_shape(sample_weight.shape, rows) and same_shape(target.shape, logits.shape if soft else rows)


def check(sample_weight: Any, logits: Tensor) -> None:
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight must be a Tensor, not {type(sample_weight).__name__}")
    rows = rows_of(logits)
    if not same_shape(sample_weight.shape, rows):
        raise ValueError(
            f"sample_weight must be of the rows' shape {tuple(rows)}, got shape {tuple(sample_weight.shape)}"
        )
    if not sample_weight.is_floating_point():
        raise ValueError(f"sample_weight must be of a floating point dtype, got {sample_weight.dtype}")
    if sample_weight.device != logits.device:
        raise ValueError(f"sample_weight must be on the input's device {logits.device}, got {sample_weight.device}")


def weighted(x: Tensor, s: Tensor, kept: Tensor | None, losses_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The losses of the rows of x times their weights s; 0 where a row is not kept, and where its weight is 0.

    A row whose logits are no numbers is left out if its weight is 0, and otherwise has its derivative by the weight.
    """
    dim = class_dim(x)
    peak = x.detach().amax(dim)
    usable = (s != 0) | ((peak > -torch.inf) & (peak < torch.inf))
    if kept is not None:
        usable = usable & kept
    return torch.where(usable, _product(losses_of(torch.where(usable.unsqueeze(dim), x, 0.0)), s), 0.0)


def reduced_by_weight(
    losses: Tensor, s: Tensor, kept: Tensor | None, of_class: Tensor | None, reduction: str, zero: bool
) -> Tensor:
    """A mean divides by the sum of the weights of the rows that are kept, times those of their classes."""
    if reduction != "mean":
        return reduced(losses, losses, reduction, zero)
    s = s if kept is None else torch.where(kept, s, 0.0)
    counted = s if of_class is None else _product(of_class, s)
    nothing = (s == 0).all()  # then the gradient is 0, and not that of 0 / 0
    mean = reduced(losses, torch.where(nothing, torch.inf, counted.sum()), reduction, zero)
    return mean if zero else mean + torch.where(nothing, torch.nan, 0.0)


def _product(a: Tensor, s: Tensor) -> Tensor:
    """a s, which is 0 where s is 0 and a is no number."""
    return torch.where((s == 0) & ~a.isfinite(), 0.0, a) * s
