"""Sigmoid focal loss."""

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route
from .._dtypes import in_float, widened
from .._sizes import same_shape
from ._elementwise import INDEX_DTYPES, check_broadcasts, reduced
from ._numbers import NUMBERS, checked, refuse_others

__all__ = ["sigmoid_focal_loss"]


def of_elements(x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """The losses of the elements; TorchScript compiles this too."""
    # Everything comes from u = e^-|x| and from 0 and 1, which are exact, so that a confident element loses no digit.
    positive = x >= 0
    distance = torch.where(positive, x, -x)
    u = torch.exp(-distance)
    losses = torch.where(positive, 1 - t, -t) * x + torch.log1p(u)
    if gamma != 0:
        # m = p (1 - t) + q t. The derivatives of exp(gamma log m) stay bounded where those of m^gamma divide by m = 0.
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
    if not isinstance(alpha, NUMBERS):
        alpha = checked("sigmoid_focal_loss", "alpha", alpha)
    if not same_shape(x.shape, t.shape):
        raise ValueError(f"Target size ({t.shape}) must be the same as input size ({x.shape})")
    losses = of_elements(x, t, alpha, gamma)
    if weight is not None:
        losses = losses * weight
    return reduced(losses, reduction).to(x.dtype if widened(inputs) else inputs.dtype)


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
        weight: a factor w that broadcasts to the inputs, such as one for each class, (C) or (C, 1, ...), or one for
            each row, (N, 1) or (N, 1, d1, ...). It runs fused in the dtype of the inputs.
        ignore_index: class indices of this value count nowhere and get no gradient, whatever the logits.
        normalizer: what ``"mean"`` divides the sum by in place of the number of elements, such as the number of
            positives: a number, or a tensor of one element, which a GPU never has to hand to the host.

    Raises:
        ValueError: ``gamma`` is negative or NaN, ``reduction`` is unknown, ``normalizer`` stands beside another
            reduction than ``"mean"`` or has several elements, or the shapes do not fit.
        TypeError: ``alpha``, ``gamma`` or ``normalizer`` is no number, nor a tensor of one.
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
    if has_torch_function_variadic(inputs, targets, weight, normalizer) and _route.overrides_apply():
        return _route.overridden(
            sigmoid_focal_loss, (inputs, targets, weight, normalizer), inputs, targets, alpha=alpha, gamma=gamma,
            reduction=reduction, weight=weight, ignore_index=ignore_index, normalizer=normalizer,
        )  # fmt: skip
    if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
        refuse_others("sigmoid_focal_loss", inputs=inputs, targets=targets)
    if not isinstance(gamma, NUMBERS):
        gamma = checked("sigmoid_focal_loss", "gamma", gamma)
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer needs reduction='mean', whose sum it divides, got {reduction!r}")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or a tensor of one element, got shape {tuple(normalizer.shape)}")
    if normalizer is not None and not isinstance(normalizer, NUMBERS):
        normalizer = checked("sigmoid_focal_loss", "normalizer", normalizer)
    if isinstance(normalizer, NUMBERS) and not normalizer > 0:  # of a tensor that is 0 the result tells
        raise ValueError(f"normalizer must be positive, got {normalizer}")
    check_broadcasts("weight", weight, inputs)

    kind = reduction if normalizer is None else "sum"
    if targets.dtype in INDEX_DTYPES and not same_shape(targets.shape, inputs.shape):
        loss = _sigmoid_focal(inputs, targets.long(), weight, kind, alpha, gamma, ignore_index=ignore_index)
    else:
        loss = _sigmoid_focal(inputs, targets, weight, kind, alpha, gamma)
    if normalizer is None:
        return loss
    return (loss / normalizer).to(loss.dtype)
