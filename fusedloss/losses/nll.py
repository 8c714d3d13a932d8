"""Negative log-likelihood of log-probabilities."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import in_float
from ._ignored import IgnoreIndex, is_one, with_one_index
from ._rows import class_index

__all__ = ["nll_loss"]


@_route.softmax("nll", left="few", mean_by_weight=True)
def _nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Tensor:  # fmt: skip
    if wide:
        logits, weight = in_float(logits), weight if weight is None else in_float(weight)
    if isinstance(logits, Tensor) and logits.layout == torch.strided:
        logits = logits.contiguous()  # torch's derivative takes no other strides
    return _torchs.nll_loss(logits, class_index(target), weight, ignore_index=ignore_index, reduction=reduction)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: IgnoreIndex = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Negative log-likelihood of log-probabilities, as :func:`torch.nn.functional.nll_loss`.

    .. math:: \ell = -w_y x_y

    Args:
        input: log-probabilities (C), (N, C) or (N, C, d1, ...), as the logits of :func:`cross_entropy`.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8.
        weight: a factor for each of the C classes; the mean then divides by the sum of the targets' weights.
        ignore_index: targets of this value, or of one of these values, count nowhere and get no gradient; or a mask of
            the rows that are ignored, as for :func:`cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        sample_weight: a factor for each row, as for :func:`cross_entropy`; the mean then divides by the sum of the
            factors times the targets' weights.

    Raises:
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.
        ValueError, TypeError: a ``sample_weight`` or an ``ignore_index``, as for :func:`cross_entropy`.
        ValueError, RuntimeError: as torch, for shapes, dtypes and reductions that do not fit.

    >>> nll_loss(torch.tensor([[-0.5, -1.0], [-2.0, -0.1]]), torch.tensor([0, 1]))
    tensor(0.3000)
    """
    if has_torch_function_variadic(input, target, weight, sample_weight) and _route.overrides_apply():
        return _route.overridden(
            nll_loss, (input, target, weight, sample_weight), input, target, weight=weight,
            size_average=size_average, ignore_index=ignore_index, reduce=reduce, reduction=reduction,
            sample_weight=sample_weight,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    index: Any = ignore_index
    if type(index) is not int and not is_one(index):
        target, index, sample_weight = with_one_index("nll_loss", input, target, index, sample_weight)
    if sample_weight is None:
        return _nll(input, target, weight, reduction, index)
    return _nll(input, target, weight, reduction, index, sample_weight=sample_weight)
