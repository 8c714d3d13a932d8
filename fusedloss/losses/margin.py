"""Losses of labels and margins: hinge embedding, soft margin, soft margin of several labels, margin ranking."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import HALVES, widened
from .._sizes import is_empty, same_shape
from ._elementwise import reduced
from .binary import _binary_cross_entropy_with_logits

__all__ = ["hinge_embedding_loss", "margin_ranking_loss", "multilabel_soft_margin_loss", "soft_margin_loss"]


@_route.pointwise("hinge_embedding", left="always")
def _hinge_embedding(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, margin: float = 1.0
) -> Tensor:
    if weight is not None:
        return reduced(_torchs.hinge_embedding_loss(input, target, margin, reduction="none") * weight, reduction)
    return _torchs.hinge_embedding_loss(input, target, margin, reduction=reduction)


@_route.pointwise("soft_margin", left="few")
def _soft_margin(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        return reduced(_torchs.soft_margin_loss(input, target, reduction="none") * weight, reduction)
    return _torchs.soft_margin_loss(input, target, reduction=reduction)


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Hinge embedding loss, as :func:`torch.nn.functional.hinge_embedding_loss`.

    .. math:: \ell = \begin{cases} x & t = 1 \\ \max(0, \mathrm{margin} - x) & t = -1 \end{cases}

    A target other than 1 and -1 gives the sum of both cases, as in torch.

    Args:
        input: distances x, any shape and strides. float32, float64, bfloat16 and float16 run fused on the CPU and on
            CUDA; the result has the input's dtype.
        target: t, of a shape that broadcasts with the input's, in a floating point or integer dtype.
        margin: any number.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: the shapes do not broadcast.
        ValueError: an unknown ``reduction``.

    >>> hinge_embedding_loss(torch.tensor([0.5, 0.5]), torch.tensor([1, -1]), margin=2.0)
    tensor(1.)
    """
    if has_torch_function_variadic(input, target) and _route.overrides_apply():
        return _route.overridden(
            hinge_embedding_loss, (input, target), input, target,
            margin=margin, size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if isinstance(target, Tensor) and target.dtype == torch.uint8:
        target = target.to(torch.int8)  # torch takes 255 for -1
    return _hinge_embedding(input, target, None, reduction, margin)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Soft margin loss, as :func:`torch.nn.functional.soft_margin_loss`.

    .. math:: \ell = \log (1 + e^{-t x})

    Value and gradient are finite for scores of any size, and no digit of a confident one is lost.

    Args:
        input: scores x, any shape and strides. float32, float64, bfloat16 and float16 run fused on the CPU and on CUDA;
            the result has the input's dtype.
        target: t, 1 or -1, of the same shape, in a floating point or integer dtype.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: the target does not broadcast to the input, or requires a gradient.
        ValueError: an unknown ``reduction``.

    >>> soft_margin_loss(torch.tensor([2.0, 2.0]), torch.tensor([1, -1]))
    tensor(1.1269)
    """
    if has_torch_function_variadic(input, target) and _route.overrides_apply():
        return _route.overridden(
            soft_margin_loss, (input, target), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _soft_margin(input, target, None, reduction)


def _why_not_binary(input: Any, target: Any, weight: Any, reduction: str) -> str | None:
    """Why a call is no binary cross-entropy with logits whose rows are averaged."""
    if not all(isinstance(each, Tensor) for each in (input, target, *(() if weight is None else (weight,)))):
        return "a subclass of torch.Tensor, or no tensor"
    if reduction not in _route.REDUCTIONS:
        return "an unusual reduction"
    if not input.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return "an input or target that is no float64, float32, bfloat16 or float16"
    if not input.dim() or is_empty(input):
        return "an empty input"
    if not same_shape(input.shape, target.shape):
        return "an input and a target whose shapes do not fit"
    if weight is not None and not (weight.is_floating_point() and _route.broadcasts_to(weight.shape, input.shape)):
        return "a weight that does not fit the input"
    if weight is not None and weight.requires_grad:  # to which a binary cross-entropy has none
        return "a weight that requires a gradient"
    if input.dtype in HALVES and widened(input):
        return "autocast"  # which widens some of torch's steps, on some devices
    return None


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Soft margin loss of several labels, as :func:`torch.nn.functional.multilabel_soft_margin_loss`.

    .. math:: \ell = \frac 1 C \sum_c w_c \, (t_c \, \mathrm{softplus}(-x_c) + (1 - t_c) \, \mathrm{softplus}(x_c))

    This is the :func:`binary_cross_entropy_with_logits` of each class, averaged over the last dimension. Its kernels
    compute it.

    Args:
        input: logits x, (C), (N, C) or (N, ..., C), any strides. float32, float64, bfloat16 or float16.
        target: t, of the same shape, in a floating point or integer dtype.
        weight: a factor that broadcasts to the input, such as one for each class.
        reduction: ``"mean"`` (over all rows), ``"sum"`` or ``"none"`` (a loss for each row).

    Raises:
        RuntimeError: shapes that do not broadcast, or a target of bools.
        IndexError: an input without dimensions.
        ValueError: an unknown ``reduction``.

    >>> multilabel_soft_margin_loss(torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 1]]))
    tensor(0.4566)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            multilabel_soft_margin_loss, (input, target, weight), input, target, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if (why := _why_not_binary(input, target, weight, reduction)) is not None:
        _route.tell_native(why)
        return _torchs.multilabel_soft_margin_loss(input, target, weight, reduction=reduction)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None and weight.dim():
        dtype = torch.promote_types(dtype, weight.dtype)
    target = target.to(dtype)
    if reduction == "none":
        return _binary_cross_entropy_with_logits(input, target, weight, "none").mean(-1)
    mean = _binary_cross_entropy_with_logits(input, target, weight, "mean")
    return mean if reduction == "mean" else mean * math.prod(input.shape[:-1])


@_route.pointwise("margin_ranking", left="always")
def _margin_ranking(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, margin: float = 0.0,
    *, third: Tensor | None = None,
) -> Tensor:  # fmt: skip
    labels = input.new_ones(()) if third is None else third
    if not input.dim() == target.dim() == labels.dim():  # which torch's function refuses
        input, target, labels = torch.broadcast_tensors(input, target, labels)
    if weight is not None:
        return reduced(_torchs.margin_ranking_loss(input, target, labels, margin, reduction="none") * weight, reduction)
    return _torchs.margin_ranking_loss(input, target, labels, margin, reduction=reduction)


def _floating(labels: Tensor, input1: Tensor, input2: Tensor) -> Tensor:
    """Integer labels as torch promotes them; those of 8 bits stay, because torch negates them in 8 bits."""
    if labels.dtype not in (torch.int64, torch.int32, torch.int16):
        return labels
    dtype = torch.promote_types(input1.dtype, input2.dtype)
    if not dtype.is_floating_point:
        return labels
    return labels.to(torch.float32 if dtype in HALVES and widened(input1) else dtype)


def margin_ranking_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Margin ranking loss, as :func:`torch.nn.functional.margin_ranking_loss`.

    .. math:: \ell = \max(0, \mathrm{margin} - y \, (x_1 - x_2))

    Args:
        input1: scores x1, any shape and strides. float32, float64, bfloat16 and float16 run fused on the CPU and on
            CUDA; operands may differ in dtype where torch's result has the dtype of ``input1`` or float32.
        input2: scores x2, of as many dimensions and a shape that broadcasts.
        target: y, 1 where x1 should be the higher one and -1 where x2 should, in a floating point or integer dtype,
            of as many dimensions and a shape that broadcasts.
        margin: any number.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: the operands differ in their number of dimensions, or do not broadcast.
        ValueError: an unknown ``reduction``.

    >>> margin_ranking_loss(torch.tensor([2.0, 1.0]), torch.tensor([1.5, 3.0]), torch.tensor([1, -1]), margin=1.0)
    tensor(0.2500)
    """
    if has_torch_function_variadic(input1, input2, target) and _route.overrides_apply():
        return _route.overridden(
            margin_ranking_loss, (input1, input2, target), input1, input2, target,
            margin=margin, size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if not all(isinstance(each, Tensor) for each in (input1, input2, target)):
        _route.tell_native("a subclass of torch.Tensor, or no tensor")
        return _torchs.margin_ranking_loss(input1, input2, target, margin, reduction=reduction)
    if not input1.dim() == input2.dim() == target.dim():
        _route.tell_native("an input and a target whose shapes do not fit")
        return _torchs.margin_ranking_loss(input1, input2, target, margin, reduction=reduction)
    return _margin_ranking(input1, input2, None, reduction, margin, third=_floating(target, input1, input2))
