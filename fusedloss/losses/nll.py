"""Negative log-likelihood of log-probabilities."""

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import in_float
from ._rows import class_index

__all__ = ["nll_loss"]


@_route.softmax("nll")
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
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of log-probabilities, as :func:`torch.nn.functional.nll_loss`.

    .. math:: \ell = -w_y x_y

    Args:
        input: log-probabilities (C), (N, C) or (N, C, d1, ...), as the logits of :func:`cross_entropy`.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8.
        weight: a factor for each of the C classes; the mean then divides by the sum of the targets' weights.
        ignore_index: targets of this value count nowhere and get no gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.
        ValueError, RuntimeError: as torch, for shapes, dtypes and reductions that do not fit.

    >>> nll_loss(torch.tensor([[-0.5, -1.0], [-2.0, -0.1]]), torch.tensor([0, 1]))
    tensor(0.3000)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return handle_torch_function(
            nll_loss, (input, target, weight), input, target, weight=weight,
            size_average=size_average, ignore_index=ignore_index, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _nll(input, target, weight, reduction, ignore_index)
