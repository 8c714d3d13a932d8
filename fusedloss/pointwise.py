"""The pointwise losses: for each the native formula, and the public function that routes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _route

__all__ = ["huber_loss", "sigmoid_focal_loss"]


@_route.pointwise("huber")
def _huber(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, delta: float = 1.0) -> Tensor:
    # torch's stubs of this function leave `weight` out
    return F.huber_loss(input, target, reduction=reduction, delta=delta, weight=weight)  # type: ignore[call-arg]


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    r"""Huber loss, as :func:`torch.nn.functional.huber_loss`.

    .. math:: \ell = w \cdot \begin{cases} \tfrac12 (x - t)^2 & |x - t| \le \delta \\
                                           \delta (|x - t| - \tfrac12 \delta) & \text{otherwise} \end{cases}

    Args:
        input: predictions x, any shape; float32, float64, bfloat16 or float16 run fused on the CPU and on CUDA.
        target: t, of the same shape; another shape broadcasts natively, with torch's warning.
        reduction: ``"mean"`` (over all elements, also with a weight), ``"sum"`` or ``"none"``.
        delta: where the quadratic part ends; positive.
        weight: one factor per element, of the input's shape.

    Raises:
        RuntimeError: ``delta`` is not positive, or the shapes do not broadcast.
        ValueError: an unknown ``reduction``, or a weight of another size.

    >>> huber_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]))
    tensor(1.3125)
    """
    return _huber(input, target, weight, reduction, delta)


@_route.pointwise("sigmoid_focal")
def _sigmoid_focal(
    inputs: Tensor, targets: Tensor, weight: Tensor | None, reduction: str, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    x = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    t = targets.to(x.dtype)
    if x.shape != t.shape:
        raise ValueError(f"Target size ({t.shape}) must be the same as input size ({x.shape})")
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
    if weight is not None:
        losses = losses * weight
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return losses.to(inputs.dtype)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    r"""Sigmoid focal loss with the signature and values of ``torchvision.ops.sigmoid_focal_loss``.

    With p the sigmoid of the input and :math:`m = p (1 - t) + (1 - p) t` the probability of being wrong,

    .. math:: \ell = (\alpha t + (1 - \alpha)(1 - t)) \; m^\gamma \; \mathrm{BCE}(p, t)

    from Lin et al., "Focal Loss for Dense Object Detection" (2017). Value and gradient are finite for every
    ``gamma >= 0`` and every finite logit; torchvision's gradient is NaN for ``gamma < 1`` and confident logits.

    Args:
        inputs: logits, any shape.
        targets: of the same shape, in [0, 1]; soft targets enter m linearly.
        alpha: weight of the positive class; negative for none.
        gamma: focusing exponent, at least 0; 0 gives a weighted binary cross-entropy.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: ``gamma`` is negative or NaN, ``reduction`` is unknown, or the shapes differ.

    >>> sigmoid_focal_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    tensor([0.0433, 0.1300])
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    return _sigmoid_focal(inputs, targets, None, reduction, alpha, gamma)
