"""Losses of the difference x - t: MSE, L1, smooth L1 and Huber."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import HALVES, in_float, widened
from ._elementwise import broadcast, reduced, warn_of_broadcasting

__all__ = ["huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss"]


# What torch computes beside a weight, step by step: also of dtypes that its mse_loss and l1_loss do not take.
def _squared(input: Tensor, target: Tensor) -> Tensor:
    return torch.pow(input - target, 2)


def _absolute(input: Tensor, target: Tensor) -> Tensor:
    return torch.abs(input - target)


def _weighted(errors: _route.Formula, input: Tensor, target: Tensor, weight: Tensor, reduction: str) -> Tensor:
    return reduced(errors(*broadcast(input, target)) * weight, reduction)


@_route.pointwise("mse", left="always")
def _mse(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        return _weighted(_squared, input, target, weight, reduction)
    return _torchs.mse_loss(*broadcast(input, target), reduction=reduction)


@_route.pointwise("l1", left="always")
def _l1(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        return _weighted(_absolute, input, target, weight, reduction)
    return _torchs.l1_loss(*broadcast(input, target), reduction=reduction)


@_route.pointwise("smooth_l1", left="always")
def _smooth_l1(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, beta: float = 1.0) -> Tensor:
    if weight is not None:
        errors = partial(_torchs.smooth_l1_loss, reduction="none", beta=beta)
        return _weighted(errors, input, target, weight, reduction)
    return _torchs.smooth_l1_loss(*broadcast(input, target), reduction=reduction, beta=beta)


@_route.pointwise("huber", left="always")
def _huber(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, delta: float = 1.0) -> Tensor:
    if weight is not None:
        errors = partial(_torchs.huber_loss, reduction="none", delta=delta)
        return _weighted(errors, input, target, weight, reduction)
    return _torchs.huber_loss(*broadcast(input, target), reduction=reduction, delta=delta)


def _prepared(
    input: Tensor, target: Tensor, size_average: bool | None, reduce: bool | None, reduction: str
) -> str:  # fmt: skip
    """Warns of broadcasting, and returns the reduction, which the deprecated arguments may name."""
    warn_of_broadcasting(input, target, stacklevel=4)
    if size_average is not None or reduce is not None:
        return _Reduction.legacy_get_string(size_average, reduce)
    return reduction


def _check_weight(input: Tensor, target: Tensor, weight: Tensor) -> None:
    broadcast(input, target)  # raises first, as in torch
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")


def _weighted_mean(
    loss: _route.Formula, errors: _route.Formula, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """A loss whose mean divides by the sum of the weights."""
    if weight is None:
        return loss(input, target, None, reduction)
    _check_weight(input, target, weight)
    kind = "sum" if reduction == "mean" else reduction
    if input.dtype in HALVES and widened(input):
        # Autocast widens some of torch's steps and not others, and only torch knows the dtype that comes out.
        _route.tell_native("a weight under autocast")
        losses = _weighted(errors, input, target, weight, kind)
        return losses / weight.sum() if reduction == "mean" else losses
    if reduction != "mean":
        return loss(input, target, weight, reduction)
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), weight.dtype)
    # A float32 weight makes the sum float32 too, which overflows only where the mean does.
    wide = in_float(weight)
    if target.dim() and not wide.dim():
        wide = wide.reshape(1)  # without a dimension, its dtype would give way to that of half-precision losses
    mean = loss(input, target, wide, kind) / wide.sum()
    return mean.to(dtype) if dtype.is_floating_point else mean


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error, as :func:`torch.nn.functional.mse_loss`.

    .. math:: \ell = w \, (x - t)^2

    Args:
        input: predictions x, any shape and strides. float32, float64, bfloat16 and float16 run fused on the CPU and on
            CUDA; input and target may differ in dtype where torch's result has the input's dtype or float32.
        target: t, of the same shape; another shape broadcasts, with torch's warning.
        reduction: ``"mean"`` (over all elements; with a weight, divided by the sum of the weights), ``"sum"`` or
            ``"none"``.
        weight: one factor per element, of the input's shape.

    Raises:
        RuntimeError: the shapes do not broadcast.
        ValueError: an unknown ``reduction``, or a weight of another size.

    >>> mse_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(4.6250)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            mse_loss, (input, target, weight), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, weight=weight,
        )  # fmt: skip
    reduction = _prepared(input, target, size_average, reduce, reduction)
    return _weighted_mean(_mse, _squared, input, target, weight, reduction)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Absolute error, as :func:`torch.nn.functional.l1_loss`.

    .. math:: \ell = w \, |x - t|

    The gradient is 0 where x = t. Arguments and errors are those of :func:`mse_loss`.

    >>> l1_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(1.7500)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            l1_loss, (input, target, weight), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, weight=weight,
        )  # fmt: skip
    reduction = _prepared(input, target, size_average, reduce, reduction)
    return _weighted_mean(_l1, _absolute, input, target, weight, reduction)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    r"""Smooth L1 loss, as :func:`torch.nn.functional.smooth_l1_loss`.

    .. math:: \ell = \begin{cases} \tfrac12 (x - t)^2 / \beta & |x - t| < \beta \\
                                   |x - t| - \tfrac12 \beta & \text{otherwise} \end{cases}

    Args:
        input: predictions x, as for :func:`mse_loss`.
        target: t, of the same shape; another shape broadcasts, with torch's warning.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        beta: where the quadratic part ends, at least 0; 0 gives the :func:`l1_loss`.

    Raises:
        RuntimeError: ``beta`` is negative, or the shapes do not broadcast.
        ValueError: an unknown ``reduction``.

    >>> smooth_l1_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(1.3125)
    """
    if has_torch_function_variadic(input, target) and _route.overrides_apply():
        return _route.overridden(
            smooth_l1_loss, (input, target), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, beta=beta,
        )  # fmt: skip
    reduction = _prepared(input, target, size_average, reduce, reduction)
    if beta == 0.0:
        return _l1(input, target, None, reduction)
    return _smooth_l1(input, target, None, reduction, beta)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    r"""Huber loss, as :func:`torch.nn.functional.huber_loss`.

    .. math:: \ell = w \cdot \begin{cases} \tfrac12 (x - t)^2 & |x - t| \le \delta \\
                                           \delta (|x - t| - \tfrac12 \delta) & \text{otherwise} \end{cases}

    Args:
        input: predictions x, as for :func:`mse_loss`.
        target: t, of the input's dtype and shape; another shape broadcasts, with torch's warning.
        reduction: ``"mean"`` (over all elements, also with a weight), ``"sum"`` or ``"none"``.
        delta: where the quadratic part ends; positive.
        weight: one factor per element, of the input's shape.

    Raises:
        RuntimeError: ``delta`` is not positive, or the shapes do not broadcast.
        ValueError: an unknown ``reduction``, or a weight of another size.

    >>> huber_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(1.3125)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            huber_loss, (input, target, weight), input, target, reduction=reduction, delta=delta, weight=weight
        )
    warn_of_broadcasting(input, target)
    if weight is not None:
        _check_weight(input, target, weight)
    return _huber(input, target, weight, reduction, delta)
