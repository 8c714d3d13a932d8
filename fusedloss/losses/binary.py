"""Binary cross-entropy of probabilities and of logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import HALVES, in_float, widened
from .._sizes import same_shape
from ._elementwise import INDEX_DTYPES, check_broadcasts
from ._numbers import NUMBERS, checked

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits"]


# Never left to a compiler: Inductor's formula takes numbers outside [0, 1] for probabilities, and gives NaN.
@_route.pointwise("binary_cross_entropy", of_probabilities=True, class_indices=True)
def _binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _torchs.binary_cross_entropy(input, target, weight, reduction=reduction)


@_route.pointwise("binary_cross_entropy_with_logits", left="few", class_indices=True)
def _binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *, third: Tensor | None = None
) -> Tensor:
    return _torchs.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=third)


# A target t is read as off + (on - off) t.
@_route.pointwise("smoothed_binary_cross_entropy", class_indices=True)
def _smoothed_binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, off: float = 0.05, on: float = 0.95,
    *, third: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x = in_float(input)
    smoothed = off + (on - off) * target.to(x.dtype)
    loss = _torchs.binary_cross_entropy_with_logits(x, smoothed, weight, reduction=reduction, pos_weight=third)
    return loss.to(x.dtype if widened(input) else input.dtype)


def _smoothed_targets(classes: int, label_smoothing: float, target_threshold: float | None) -> tuple[float, float]:
    """What the target of a class is that an index does not name, and of the one that it does."""
    off = label_smoothing / classes
    on = 1 - label_smoothing + off
    return (off, on) if target_threshold is None else (float(off > target_threshold), float(on > target_threshold))


def _class_indices(target: Tensor) -> Tensor:
    if target.dtype not in INDEX_DTYPES:
        raise ValueError(f"ignore_index needs targets of a floating point or integer dtype, got {target.dtype}")
    return target.long()


def _over_kept_elements(
    loss: Any, absent: float, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of the elements whose target is not ``ignore_index``; with the target 0 that of ``absent`` is exactly 0.

    A mean is a sum over the number of those elements, in float32 where a half type would round it twice or overflow.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"argument 'ignore_index' must be int, not {type(ignore_index).__name__}")
    if not same_shape(target.shape, input.shape):
        return loss(input, target, weight, reduction, **options)  # torch's error
    kept = target != ignore_index
    x, t = torch.where(kept, input, absent), torch.where(kept, target, 0.0)
    if weight is not None and same_shape(weight.shape, input.shape):
        weight = torch.where(kept, weight, 0.0)  # whatever it is there
    if reduction != "mean":
        return loss(x, t, weight, reduction, **options)
    rounds = target.dtype in HALVES and not widened(input)
    if rounds and loss is _binary_cross_entropy and input.dtype == target.dtype:  # takes one dtype
        x, weight = x.float(), weight.float() if weight is not None and weight.dtype == input.dtype else weight
    total = loss(x, t.float() if rounds else t, weight, "sum", **options)
    mean = total / kept.sum()
    return mean.to(target.dtype) if rounds else mean


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Binary cross-entropy of probabilities, as :func:`torch.nn.functional.binary_cross_entropy`.

    .. math:: \ell = -w \, (t \log x + (1 - t) \log (1 - x))

    with logarithms of at least -100.

    With an ``ignore_index`` integer targets are class indices y, and the result is that of their one-hot, which the
    kernels never build: :math:`t_c` is 1 in the column c = y and 0 in every other. The number of classes C, like every
    negative number but ``ignore_index``, is the background: t is 0 in all columns.

    Floating point targets stay what they are, and an element whose target is ``ignore_index`` counts nowhere. That
    copies the input and the target, and the gradient once more, around the fused loss.

    Args:
        input: probabilities x in [0, 1], any shape and strides; (N, C) or (N, C, d1, ...) for class indices. float32,
            float64, bfloat16 or float16.
        target: t in [0, 1], of the same shape and dtype. With an ``ignore_index``: class indices (N) or (N, d1, ...) in
            int64, or in another integer dtype, which is converted.
        weight: a factor that broadcasts to the input, of its dtype.
        reduction: ``"mean"`` (over all elements that are not ignored, whatever their weight), ``"sum"`` or ``"none"``
            (the shape of the input).
        ignore_index: targets of this value, class indices or elements, count nowhere and get no gradient, whatever the
            input. ``None``: everything is as in torch.

    Raises:
        RuntimeError: an input or a target is NaN or outside [0, 1] (on a GPU its loss is NaN instead), or the dtypes
            differ.
        ValueError: the sizes do not fit, an unknown ``reduction``, or an ``ignore_index`` beside targets that are bools
            or complex.
        TypeError: an ``ignore_index`` beside floating point targets that is no int.
        IndexError: a class index is above C and not ``ignore_index``. On a GPU the losses of its row are NaN instead,
            and the next forward outside a replayed graph or :func:`fusedloss.check` raises.

    >>> binary_cross_entropy(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
    tensor(0.1643)

    A row of class 1, a background and an ignored row:

    >>> x = torch.tensor([[0.5, 0.9], [0.5, 0.2], [0.5, 0.5]])
    >>> binary_cross_entropy(x, torch.tensor([1, 2, -100]), reduction="none", ignore_index=-100)
    tensor([[0.6931, 0.1054],
            [0.6931, 0.2231],
            [0.0000, 0.0000]])
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            binary_cross_entropy, (input, target, weight), input, target, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction, ignore_index=ignore_index,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if ignore_index is None:
        return _binary_cross_entropy(input, target, weight, reduction)
    if target.is_floating_point():
        return _over_kept_elements(_binary_cross_entropy, 0.0, input, target, weight, reduction, ignore_index)
    check_broadcasts("weight", weight, input)
    return _binary_cross_entropy(input, _class_indices(target), weight, reduction, ignore_index=ignore_index)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, as :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    .. math:: \ell = w \, (p \, t \, \mathrm{softplus}(-x) + (1 - t) \, \mathrm{softplus}(x))

    with :math:`\mathrm{softplus}(x) = \log(1 + e^x)`, accurate to the last digits for logits of any size.

    With an ``ignore_index`` integer targets are class indices, as :func:`binary_cross_entropy` explains them, and
    elements of floating point targets may be missing.

    Args:
        input: logits x, any shape and strides; (N, C) or (N, C, d1, ...) for class indices. float32, float64, bfloat16
            or float16.
        target: t, of the same shape, in the input's dtype, or in float32 beside a bfloat16 or float16 input; the
            result has the target's dtype. With an ``ignore_index``: class indices (N) or (N, d1, ...) in int64, or in
            another integer dtype, which is converted; the result has the input's dtype, under autocast float32.
        weight: a factor w that broadcasts to the input.
        reduction: ``"mean"`` (over all elements that are not ignored, whatever their weight), ``"sum"`` or ``"none"``
            (the shape of the input).
        pos_weight: a factor p of the positive term that broadcasts to the input, such as one for each class: (C) beside
            (N, C), or (C, 1, 1) beside (N, C, H, W). It is read through its strides.
        ignore_index: targets of this value, class indices or elements, count nowhere and get no gradient, whatever the
            logits. ``None``: everything is as in torch.
        label_smoothing: s from 0 to 1, of class indices: the target is 1 - s + s / C in the column that the index names
            and s / C in every other, as timm has it. Beside a ``pos_weight`` it runs natively.
        target_threshold: targets above it, after smoothing, count as 1, the others as 0.

    Raises:
        RuntimeError: a weight that does not broadcast, or, without ``ignore_index``, a target of an integer dtype.
        ValueError: the sizes do not fit, an unknown ``reduction``, or an ``ignore_index`` beside targets that are bools
            or complex, or class indices and a weight that does not broadcast. A ``label_smoothing`` outside [0, 1] or
            of targets that are no class indices.
        TypeError: an ``ignore_index`` beside floating point targets that is no int.
        IndexError: a class index is out of range, as for :func:`binary_cross_entropy`.

    >>> binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2201)

    A row of class 1, a background and an ignored row:

    >>> x = torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.0, 0.0]])
    >>> binary_cross_entropy_with_logits(x, torch.tensor([1, 2, -100]), reduction="none", ignore_index=-100)
    tensor([[0.6931, 0.1269],
            [0.6931, 0.3133],
            [0.0000, 0.0000]])

    Labels of which one is missing:

    >>> binary_cross_entropy_with_logits(x[:2], torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), ignore_index=-1)
    tensor(0.3778)

    Class indices whose targets are 0.95 and 0.05:

    >>> binary_cross_entropy_with_logits(x[:2], torch.tensor([1, 0]), ignore_index=-100, label_smoothing=0.1)
    tensor(0.4941)
    """
    if has_torch_function_variadic(input, target, weight, pos_weight) and _route.overrides_apply():
        return _route.overridden(
            binary_cross_entropy_with_logits, (input, target, weight, pos_weight), input, target, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction, pos_weight=pos_weight,
            ignore_index=ignore_index, label_smoothing=label_smoothing, target_threshold=target_threshold,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    loss = _binary_cross_entropy_with_logits
    of_indices = ignore_index is not None and not target.is_floating_point()
    if not isinstance(label_smoothing, NUMBERS):
        label_smoothing = checked("binary_cross_entropy_with_logits", "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if label_smoothing > 0 and not of_indices:
        raise ValueError("label_smoothing needs class indices, integer targets beside an ignore_index")
    if target_threshold is not None and not of_indices:
        above = (target > target_threshold).to(target.dtype)
        target = above if ignore_index is None else torch.where(target == ignore_index, target, above)
    if ignore_index is None:
        return loss(input, target, weight, reduction, third=pos_weight)
    if target.is_floating_point():
        # exp(-1e4) is 0 in every dtype, and float16 has the number.
        return _over_kept_elements(
            loss, -1e4, input, target, weight, reduction, ignore_index, third=pos_weight
        )  # fmt: skip
    check_broadcasts("weight", weight, input)
    check_broadcasts("pos_weight", pos_weight, input)
    if input.dim() >= 2 and (label_smoothing > 0 or target_threshold is not None):
        params = _smoothed_targets(input.shape[1], label_smoothing, target_threshold)
        if params != (0, 1):
            return _smoothed_binary_cross_entropy(
                input, _class_indices(target), weight, reduction, *params, third=pos_weight, ignore_index=ignore_index
            )
    return loss(input, _class_indices(target), weight, reduction, third=pos_weight, ignore_index=ignore_index)
