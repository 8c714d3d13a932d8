"""Losses of the difference x - t: MSE, L1, smooth L1 and Huber."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import HALVES, in_float, widened
from ._elementwise import broadcast, reduced, warn_of_broadcasting

__all__ = ["huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss"]


def _times_weight(
    torchs: _route.Formula, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, **param: Any
) -> Tensor:
    """The native formula of all four: torch's own loss, times the weight."""
    input, target = broadcast(input, target)
    if weight is None:
        return torchs(input, target, reduction=reduction, **param)
    return reduced(torchs(input, target, reduction="none", **param) * weight, reduction)


@_route.pointwise("mse")
def _mse(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _times_weight(_torchs.mse_loss, input, target, weight, reduction)


@_route.pointwise("l1")
def _l1(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _times_weight(_torchs.l1_loss, input, target, weight, reduction)


@_route.pointwise("smooth_l1")
def _smooth_l1(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, beta: float = 1.0) -> Tensor:
    return _times_weight(_torchs.smooth_l1_loss, input, target, weight, reduction, beta=beta)


@_route.pointwise("huber")
def _huber(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, delta: float = 1.0) -> Tensor:
    return _times_weight(_torchs.huber_loss, input, target, weight, reduction, delta=delta)


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
    loss: _route.Formula, torchs: _route.Formula, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """A loss whose mean divides by the sum of the weights."""
    if weight is None:
        return loss(input, target, None, reduction)
    _check_weight(input, target, weight)
    if input.dtype in HALVES and widened(input):
        # Autocast widens some of torch's steps and not others, and only torch knows the dtype that comes out.
        _route.tell_native("a weight under autocast")
        return torchs(*broadcast(input, target), reduction=reduction, weight=weight)
    if reduction != "mean":
        return loss(input, target, weight, reduction)
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), weight.dtype)
    # A float32 weight makes the sum float32 too, which overflows only where the mean does.
    wide = in_float(weight)
    if target.dim() and not wide.dim():
        wide = wide.reshape(1)  # without a dimension, its dtype would give way to that of half-precision losses
    return (loss(input, target, wide, "sum") / wide.sum()).to(dtype)


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
        return handle_torch_function(
            mse_loss, (input, target, weight), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, weight=weight,
        )  # fmt: skip
    reduction = _prepared(input, target, size_average, reduce, reduction)
    return _weighted_mean(_mse, _torchs.mse_loss, input, target, weight, reduction)


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
        return handle_torch_function(
            l1_loss, (input, target, weight), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, weight=weight,
        )  # fmt: skip
    reduction = _prepared(input, target, size_average, reduce, reduction)
    return _weighted_mean(_l1, _torchs.l1_loss, input, target, weight, reduction)


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
        return handle_torch_function(
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
        return handle_torch_function(
            huber_loss, (input, target, weight), input, target, reduction=reduction, delta=delta, weight=weight
        )
    warn_of_broadcasting(input, target)
    if weight is not None:
        _check_weight(input, target, weight)
    return _huber(input, target, weight, reduction, delta)
