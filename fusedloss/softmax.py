"""The softmax losses: for each the native formula, and the public function that routes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _route

__all__ = ["cross_entropy", "focal_loss"]


@_route.softmax("cross_entropy")
def _cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits, target, weight=weight, ignore_index=ignore_index, reduction=reduction)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    grad_in_forward: bool | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`.

    .. math:: \ell = -w_y \log \frac{e^{x_y}}{\sum_c e^{x_c}}

    Class indices run fused; class probabilities, label smoothing and the deprecated ``size_average`` and ``reduce``
    run natively.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16, read in place whatever
            their strides.
        target: class indices (), (N) or (N, d1, ...) in int64, or what else torch takes.
        weight: a factor for each of the C classes; the mean then divides by the sum of the targets' weights.
        ignore_index: targets of this value count nowhere and get no gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: as in torch.
        grad_in_forward: ``True`` makes the gradient while forward has the logits at hand, one read and one write of
            them in all; backward then multiplies it by the upstream gradient, which costs nothing where that is 1 and
            a read and a write otherwise. ``False`` leaves it to backward: two reads and one write. ``None`` takes what
            never moves more bytes, now ``False``. No effect on float16 (an unscaled gradient would underflow), on
            ``reduction="none"``, or where nothing requires a gradient.
        inplace: lets the gradient overwrite the logits, so that training needs O(N) memory beyond them. They hold
            their values until backward, or only until this call returns with ``grad_in_forward=True``. The gradient
            that backward hands on is their memory: what is written to them later changes it. Without grad mode nothing
            is overwritten. Like ``grad_in_forward`` it is ignored where the call runs natively.

    Raises:
        IndexError: a target is out of range and not ``ignore_index``. On a GPU the loss is NaN instead, and the next
            forward outside a replayed graph or :func:`fusedloss.check` raises.
        RuntimeError: ``inplace=True`` with logits that are a leaf requiring grad or that overlap in memory, or a
            backward through overwritten logits: a second one, or one with ``create_graph=True``.
        ValueError, RuntimeError: as torch, for shapes, dtypes and reductions that do not fit.

    >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, -100]))
    tensor(0.1269)
    """
    if label_smoothing == 0.0 and size_average is None and reduce is None:
        if grad_in_forward is None and not inplace:
            return _cross_entropy(input, target, weight, reduction, ignore_index)
        return _cross_entropy(
            input, target, weight, reduction, ignore_index, grad_in_forward=grad_in_forward, inplace=inplace
        )
    return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


@_route.softmax("focal")
def _focal(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    factor: float = 1.0,
    gamma: float = 2.0,
) -> Tensor:
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    class_dim = min(x.dim() - 1, 1)
    # Picks, and rejects as torch does; its derivative knows no channels_last.
    logit = -F.nll_loss(x.contiguous(), target, ignore_index=ignore_index, reduction="none")
    kept = target != ignore_index
    index = torch.where(kept, target, 0).long()
    # The target against all others is a problem of two classes, in which no digit of a confident row is lost. Finite in
    # the target's place, where -infinity would leave a row of one class without a gradient.
    others = x.scatter(class_dim, index.unsqueeze(class_dim), torch.finfo(x.dtype).min)
    log_odds = others.logsumexp(class_dim) - logit
    losses = -F.logsigmoid(-log_odds)
    if gamma != 0:
        losses = losses * torch.exp(gamma * F.logsigmoid(log_odds))
    losses = losses * (factor if weight is None else factor * weight.to(x.dtype)[index])
    losses = torch.where(kept, losses, 0.0)
    if reduction != "none":
        losses = losses.sum() / kept.sum() if reduction == "mean" else losses.sum()
    return losses.to(logits.dtype)


def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax focal loss over class indices (Lin et al., "Focal Loss for Dense Object Detection", 2017).

    With p the softmax probability of the target,

    .. math:: \ell = \alpha_y \; (1 - p)^\gamma \; (-\log p)

    finite in value and gradient for every ``gamma >= 0`` and every finite logit. ``gamma=0, alpha=None`` is
    cross-entropy.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...), as for :func:`cross_entropy`.
        target: class indices (), (N) or (N, d1, ...) in int64.
        alpha: None, one factor, or a tensor of C class weights. The mean divides by the number of targets that are not
            ignored, never by the weights.
        gamma: focusing exponent, at least 0.
        ignore_index: targets of this value count nowhere and get no gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``gamma`` is negative or NaN, ``alpha`` has the wrong length, or ``reduction`` is unknown.
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.

    >>> focal_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor(0.0018)
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not isinstance(alpha, Tensor):
        return _focal(input, target, None, reduction, ignore_index, 1.0 if alpha is None else alpha, gamma)
    classes = input.shape[min(input.dim() - 1, 1)] if input.dim() else 0
    if alpha.shape != (classes,):
        raise ValueError(f"alpha must hold a weight for each of {classes} classes, got shape {tuple(alpha.shape)}")
    return _focal(input, target, alpha, reduction, ignore_index, 1.0, gamma)
