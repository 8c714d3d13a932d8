"""The pointwise losses: for each the native formula, and the public function that routes it."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction

from . import _route
from ._dtypes import HALVES, in_float, widened

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "huber_loss",
    "l1_loss",
    "mse_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction not in _route.REDUCTIONS:
        # torch's words of weighted losses, which know no other name of the mean
        raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    return losses.mean() if reduction == "mean" else losses.sum()


def _warn_of_broadcasting(input: Tensor, target: Tensor) -> None:
    if target.size() != input.size() and not is_compiling():  # which cannot trace a warning
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )


def _broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of one size, so that torch does not warn once more."""
    if input.size() == target.size():
        return input, target
    return torch.broadcast_tensors(input, target)  # type: ignore[return-value]


def _check_weight(input: Tensor, target: Tensor, weight: Tensor) -> None:
    _broadcast(input, target)  # whose error is torch's first
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")


def _over_weights(
    loss: _route.Formula, native: _route.Formula, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> Tensor:
    """With a weight, the mean is over the sum of the weights."""
    if weight is None:
        return loss(input, target, None, reduction)
    _check_weight(input, target, weight)
    if input.dtype in HALVES and widened(input):
        # Of torch's steps autocast knows some and not others, and the result has the dtype that comes of it.
        _route.tell_native("a weight under autocast")
        return native(*_broadcast(input, target), reduction=reduction, weight=weight)
    if reduction != "mean":
        return loss(input, target, weight, reduction)
    dtype = torch.promote_types(torch.promote_types(input.dtype, target.dtype), weight.dtype)
    # Beside a float32 weight the sum of a half type is float32, and overflows only where the mean does.
    wide = in_float(weight)
    if target.dim() and not wide.dim():
        wide = wide.reshape(1)  # one without dimensions would give way to the half losses
    return (loss(input, target, wide, "sum") / wide.sum()).to(dtype)


@_route.pointwise("mse")
def _mse(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    input, target = _broadcast(input, target)
    if weight is None:
        return F.mse_loss(input, target, reduction=reduction)
    return _reduced(F.mse_loss(input, target, reduction="none") * weight, reduction)


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
        input: predictions x, any shape and strides; float32, float64, bfloat16 or float16 run fused on the CPU and on
            CUDA, also beside each other where torch's result is of the input's dtype or float32.
        target: t, of the same shape; another shape broadcasts, with torch's warning.
        reduction: ``"mean"`` (over all elements; with a weight, over the sum of the weights), ``"sum"`` or ``"none"``.
        weight: one factor per element, of the input's shape.

    Raises:
        RuntimeError: the shapes do not broadcast.
        ValueError: an unknown ``reduction``, or a weight of another size.

    >>> mse_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(4.6250)
    """
    _warn_of_broadcasting(input, target)
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _over_weights(_mse, F.mse_loss, input, target, weight, reduction)


@_route.pointwise("l1")
def _l1(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    input, target = _broadcast(input, target)
    if weight is None:
        return F.l1_loss(input, target, reduction=reduction)
    return _reduced(F.l1_loss(input, target, reduction="none") * weight, reduction)


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

    Its gradient is 0 where x = t. Arguments and errors are those of :func:`mse_loss`.

    >>> l1_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(1.7500)
    """
    _warn_of_broadcasting(input, target)
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _over_weights(_l1, F.l1_loss, input, target, weight, reduction)


@_route.pointwise("smooth_l1")
def _smooth_l1(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, beta: float = 1.0) -> Tensor:
    input, target = _broadcast(input, target)
    if weight is None:
        return F.smooth_l1_loss(input, target, reduction=reduction, beta=beta)
    return _reduced(F.smooth_l1_loss(input, target, reduction="none", beta=beta) * weight, reduction)


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
        input: predictions x, as of :func:`mse_loss`.
        target: t, of the same shape; another shape broadcasts, with torch's warning.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        beta: where the quadratic part ends, at least 0; 0 gives the :func:`l1_loss`.

    Raises:
        RuntimeError: ``beta`` is negative, or the shapes do not broadcast.
        ValueError: an unknown ``reduction``.

    >>> smooth_l1_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(1.3125)
    """
    _warn_of_broadcasting(input, target)
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if beta == 0.0:
        return _l1(input, target, None, reduction)
    return _smooth_l1(input, target, None, reduction, beta)


@_route.pointwise("huber")
def _huber(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, delta: float = 1.0) -> Tensor:
    input, target = _broadcast(input, target)
    if weight is None:
        return F.huber_loss(input, target, reduction=reduction, delta=delta)
    return _reduced(F.huber_loss(input, target, reduction="none", delta=delta) * weight, reduction)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    r"""Huber loss, as :func:`torch.nn.functional.huber_loss`.

    .. math:: \ell = w \cdot \begin{cases} \tfrac12 (x - t)^2 & |x - t| \le \delta \\
                                           \delta (|x - t| - \tfrac12 \delta) & \text{otherwise} \end{cases}

    Args:
        input: predictions x, as of :func:`mse_loss`.
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
    _warn_of_broadcasting(input, target)
    if weight is not None:
        _check_weight(input, target, weight)
    return _huber(input, target, weight, reduction, delta)


@_route.pointwise("binary_cross_entropy", of_probabilities=True, class_indices=True)
def _binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return F.binary_cross_entropy(input, target, weight, reduction=reduction)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy of probabilities, as :func:`torch.nn.functional.binary_cross_entropy`.

    .. math:: \ell = -w \, (t \log x + (1 - t) \log (1 - x))

    with logarithms of at least -100.

    Args:
        input: probabilities x in [0, 1], any shape and strides; float32, float64, bfloat16 or float16.
        target: t in [0, 1], of the same shape and dtype.
        weight: a factor that broadcasts to the input, of its dtype.
        reduction: ``"mean"`` (over all elements, whatever their weight), ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: an input or a target is NaN or outside [0, 1] (on a GPU its loss is NaN instead), or the dtypes
            differ.
        ValueError: the sizes differ, or an unknown ``reduction``.

    >>> binary_cross_entropy(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
    tensor(0.1643)
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _binary_cross_entropy(input, target, weight, reduction)


@_route.pointwise("binary_cross_entropy_with_logits", class_indices=True)
def _binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *, pos_weight: Tensor | None = None
) -> Tensor:
    return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, as :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    .. math:: \ell = w \, (p \, t \, \mathrm{softplus}(-x) + (1 - t) \, \mathrm{softplus}(x))

    with :math:`\mathrm{softplus}(x) = \log(1 + e^x)`, to the last digits for logits of any size.

    Args:
        input: logits x, any shape and strides; float32, float64, bfloat16 or float16.
        target: t, of the same shape, in the input's dtype, or in float32 beside a bfloat16 or float16 input; the
            result has the target's dtype.
        weight: a factor w that broadcasts to the input.
        reduction: ``"mean"`` (over all elements, whatever their weight), ``"sum"`` or ``"none"``.
        pos_weight: a factor p of the positive term that broadcasts to the input, such as one for each class of
            (N, C), or (C, 1, 1) beside (N, C, H, W); it is read through its strides.

    Raises:
        RuntimeError: a weight that does not broadcast, or a target of an integer dtype.
        ValueError: the sizes differ, or an unknown ``reduction``.

    >>> binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2201)
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _binary_cross_entropy_with_logits(input, target, weight, reduction, pos_weight=pos_weight)


def _binary_focal(x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    # From u = e^-|x| and what is exact for certain targets, so that no digit of a confident element is lost.
    positive = x >= 0
    distance = torch.where(positive, x, -x)
    u = torch.exp(-distance)
    losses = torch.where(positive, 1 - t, -t) * x + torch.log1p(u)
    if gamma != 0:
        # log m, m = p (1 - t) + q t: its derivatives stay bounded where one of m^gamma would divide by m = 0.
        certain = torch.where(positive, t, 1 - t)  # 1 where the target is on the side of the logit
        mixed = torch.where(certain == 1, torch.ones_like(u), (1 - certain) + certain * u)
        log_m = torch.where(certain == 1, -distance, mixed.log()) - torch.log1p(u)
        losses = losses * torch.exp(gamma * log_m)
    if alpha >= 0:
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    return losses


@_route.pointwise("sigmoid_focal", class_indices=True)
def _sigmoid_focal(
    inputs: Tensor, targets: Tensor, weight: Tensor | None, reduction: str, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    x = in_float(inputs)
    t = targets.to(x.dtype)
    if x.shape != t.shape:
        raise ValueError(f"Target size ({t.shape}) must be the same as input size ({x.shape})")
    losses = _binary_focal(x, t, alpha, gamma)
    if weight is not None:
        losses = losses * weight
    return _reduced(losses, reduction).to(x.dtype if widened(inputs) else inputs.dtype)


_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Sigmoid focal loss, as ``torchvision.ops.sigmoid_focal_loss`` and also over class indices.

    With p the sigmoid of the input, t its target and :math:`m = p (1 - t) + (1 - p) t` the probability of being wrong,

    .. math:: \ell = w \; (\alpha t + (1 - \alpha)(1 - t)) \; m^\gamma \; \mathrm{BCE}(p, t)

    from Lin et al., "Focal Loss for Dense Object Detection" (2017). Value and gradient are finite for every
    ``gamma >= 0`` and every finite logit; torchvision's gradient is NaN for ``gamma < 1`` and confident logits.

    Class indices give the same as their one-hot, which is never built: t is 1 in the column that the index names and 0
    in every other. The number of classes C, like every negative number but ``ignore_index``, is the background: t is 0
    in all columns.

    Args:
        inputs: logits, any shape; (N, C) or (N, C, d1, ...) for class indices. float32, float64, bfloat16 and float16
            run fused on the CPU and on CUDA.
        targets: of the same shape, in [0, 1]; soft targets enter m linearly. Or class indices (N) or (N, d1, ...) in
            int64, or in another integer dtype, which is converted.
        alpha: weight of the positive class; negative for none.
        gamma: focusing exponent, at least 0; 0 gives a weighted binary cross-entropy.
        reduction: ``"none"`` (the shape of the inputs), ``"sum"``, or ``"mean"`` over all elements that are not
            ignored, whatever their weight.
        weight: a factor w that broadcasts to the inputs. Fused, in the dtype of the inputs: of their shape; for class
            indices also one for each class, (C) or (C, 1, ...), or one for each row, (N, 1) or (N, 1, d1, ...).
        ignore_index: class indices of this value count nowhere and get no gradient, whatever the logits.
        normalizer: what ``"mean"`` divides the sum by in place of the number of elements, such as the number of
            positives: a number, or a tensor of one element, which a GPU never has to hand to the host.

    Raises:
        ValueError: ``gamma`` is negative or NaN, ``reduction`` is unknown, ``normalizer`` stands with another than
            ``"mean"`` or has several elements, or the shapes do not fit.
        IndexError: a class index is above C and not ``ignore_index``. On a GPU the losses of its row are NaN instead,
            and the next forward outside a replayed graph or :func:`fusedloss.check` raises.

    >>> sigmoid_focal_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([0.0433, 0.1300])

    A box of class 1, a background and an ignored one:

    >>> sigmoid_focal_loss(torch.zeros(3, 2), torch.tensor([1, 2, -100]))
    tensor([[0.1300, 0.0433],
            [0.1300, 0.1300],
            [0.0000, 0.0000]])
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer needs reduction='mean', whose sum it divides, got {reduction!r}")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or a tensor of one element, got shape {tuple(normalizer.shape)}")
    if weight is not None and not _route.broadcasts_to(weight.shape, inputs.shape):
        raise ValueError(f"weight must broadcast to the inputs' size ({inputs.shape}), got ({weight.shape})")

    kind = reduction if normalizer is None else "sum"
    if targets.dtype in _INDEX_DTYPES and targets.shape != inputs.shape:
        loss = _sigmoid_focal(inputs, targets.long(), weight, kind, alpha, gamma, ignore_index=ignore_index)
    else:
        loss = _sigmoid_focal(inputs, targets, weight, kind, alpha, gamma)
    if normalizer is None:
        return loss
    return (loss / (normalizer.reshape(()) if isinstance(normalizer, Tensor) else normalizer)).to(loss.dtype)
