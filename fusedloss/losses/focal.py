"""Softmax focal loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import in_float, widened
from .._sizes import same_shape
from .._weighted import check, reduced_by_weight, weighted
from ._dtensors import is_dtensor, served
from ._ignored import IgnoreIndex, is_one, with_one_index
from ._numbers import NUMBERS, checked, factors_of_classes, refuse_others
from ._rows import class_dim, class_index, reduced

__all__ = ["focal_loss"]


# TorchScript compiles these three as well, hence their annotations, the limits as arguments, and no star.
def log_odds_against(x: Tensor, target: Tensor, ignore_index: int, lowest: float) -> Tensor:
    """log(q / p) of the rows, with p the probability of the target; ``lowest`` is the least finite number."""
    dim = class_dim(x)
    # nll_loss picks the target's logit and rejects what torch rejects; its derivative does not take channels_last.
    logit = -_torchs.nll_loss(x.contiguous(), target, ignore_index=ignore_index, reduction="none")
    index = torch.where(target != ignore_index, target, 0).long()
    # The target against all other classes is a problem of two classes, whose formula loses no digits in a confident
    # row. The target's place gets a finite number, because -infinity would leave a row of one class without a gradient.
    others = x.scatter(dim, index.unsqueeze(dim), lowest)
    return others.logsumexp(dim) - logit


def of_rows(x: Tensor, target: Tensor, gamma: float, ignore_index: int, lowest: float) -> Tensor:
    """The losses of the rows, without their factor."""
    log_odds = log_odds_against(x, target, ignore_index, lowest)
    losses = -_torchs.logsigmoid(-log_odds)
    if gamma != 0:
        losses = losses * torch.exp(gamma * _torchs.logsigmoid(log_odds))
    return losses


def of_probabilities(
    x: Tensor, target: Tensor, factor: float, weight: Tensor | None, gamma: float, tiny: float
) -> Tensor:
    """The losses of the rows for class probabilities; ``tiny`` is the least normal number."""
    dim = class_dim(x)
    log_p = x.log_softmax(dim)
    losses = -target * log_p
    if gamma != 0:
        q = -torch.expm1(log_p)  # 1 - p, without the rounding of p
        losses = losses * torch.exp(gamma * q.clamp_min(tiny).log())
    if weight is not None:
        losses = losses * weight.to(x.dtype).view([-1] + [1] * (x.dim() - 1 - dim))
    return (losses * factor).sum(dim)


@_route.softmax("focal")
def _focal(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    factor: float = 1.0, gamma: float = 2.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Tensor:  # fmt: skip
    x, target = in_float(logits), class_index(target)
    kept = target != ignore_index
    losses = of_rows(x, target, gamma, ignore_index, torch.finfo(x.dtype).min)
    losses = losses * (factor if weight is None else factor * weight.to(x.dtype)[torch.where(kept, target, 0).long()])
    losses = torch.where(kept, losses, 0.0)
    return reduced(losses, kept.sum(), reduction, zero).to(x.dtype if widened(logits, wide) else logits.dtype)


def _soft_focal(
    logits: Tensor, target: Tensor, factor: float, weight: Tensor | None, gamma: float, reduction: str,
    sample_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    x = in_float(logits)

    def losses_of(x: Tensor) -> Tensor:
        return of_probabilities(x, target, factor, weight, gamma, torch.finfo(x.dtype).tiny)

    if sample_weight is None:
        losses = losses_of(x)
        if reduction != "none":
            losses = losses.mean() if reduction == "mean" else losses.sum()
    else:
        check(sample_weight, logits)
        s = sample_weight.to(x.dtype)
        losses = reduced_by_weight(weighted(x, s, None, losses_of), s, None, None, reduction, False)
    return losses.to(x.dtype if widened(logits) else logits.dtype)


_OF_CLASSES = (Tensor, list, tuple)


def checked_alpha(
    function: str,
    alpha: float | Sequence[float] | Tensor | None,
    gamma: Any,
    reduction: str,
    input: Tensor,
    classes: int,
) -> tuple[Any, Tensor | None, Any]:
    """alpha as one factor, as a weight for each class, and gamma."""
    if not isinstance(gamma, NUMBERS):
        gamma = checked(function, "gamma", gamma)
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if alpha is None or isinstance(alpha, NUMBERS):
        return 1.0 if alpha is None else alpha, None, gamma
    if not isinstance(alpha, _OF_CLASSES):
        return checked(function, "alpha", alpha), None, gamma
    if not isinstance(alpha, Tensor):
        alpha = factors_of_classes(function, "alpha", alpha, dtype=input.dtype, device=input.device)
    if alpha.shape != (classes,):
        raise ValueError(f"alpha must hold a weight for each of {classes} classes, got shape {tuple(alpha.shape)}")
    return 1.0, alpha, gamma


def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor | None = None,
    gamma: float = 2.0,
    *,
    ignore_index: IgnoreIndex = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Softmax focal loss (Lin et al., "Focal Loss for Dense Object Detection", 2017).

    With p the softmax probability of the target,

    .. math:: \ell = \alpha_y \; (1 - p)^\gamma \; (-\log p)

    finite in value and gradient for every ``gamma >= 0`` and every finite logit. ``gamma=0, alpha=None`` is
    cross-entropy. With class probabilities t the loss is :math:`\sum_c \alpha_c t_c (1 - p_c)^\gamma (-\log p_c)`, and
    runs natively.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...), as for :func:`cross_entropy`.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8, or class probabilities of the input's shape.
        alpha: None, one factor, or C class weights, as a tensor, a list or a tuple. The mean divides by the number of
            targets that are not ignored, never by the weights.
        gamma: focusing exponent, at least 0.
        ignore_index: class indices of this value or of one of these values count nowhere and get no gradient, or a mask
            of the rows that are ignored, as for :func:`cross_entropy`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        sample_weight: a factor for each row, as for :func:`cross_entropy`; the mean then divides by the sum of the
            factors of the rows that are not ignored.

    Raises:
        ValueError: ``gamma`` is negative or NaN, ``alpha`` has the wrong length, ``reduction`` is unknown, or
            probabilities are not of the input's shape.
        TypeError: ``gamma`` or ``alpha`` is no number; ``input`` or ``target`` is no tensor.
        ValueError, TypeError: a ``sample_weight`` or an ``ignore_index``, as for :func:`cross_entropy`.
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.

    >>> focal_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor(0.0018)
    """
    if has_torch_function_variadic(input, target, alpha, sample_weight) and _route.overrides_apply():
        return _route.overridden(
            focal_loss, (input, target, alpha, sample_weight), input, target, alpha=alpha, gamma=gamma,
            ignore_index=ignore_index, reduction=reduction, sample_weight=sample_weight,
        )  # fmt: skip
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        refuse_others("focal_loss", input=input, target=target)
    if is_dtensor(input):
        tensors: dict[str, Any] = {"target": target, "sample_weight": sample_weight}
        options: dict[str, Any] = {"gamma": gamma, "ignore_index": ignore_index, "reduction": reduction}
        (tensors if isinstance(alpha, Tensor) else options)["alpha"] = alpha
        made = served("focal_loss", input, tensors, options)
        if made is not None:
            return made
    factor, weight, gamma = checked_alpha(
        "focal_loss", alpha, gamma, reduction, input, input.shape[class_dim(input)] if input.dim() else 0
    )
    index: Any = ignore_index
    if type(index) is not int and not is_one(index):
        target, index, sample_weight = with_one_index("focal_loss", input, target, index, sample_weight)
    if not target.is_floating_point():
        if sample_weight is None:
            return _focal(input, target, weight, reduction, index, factor, gamma)
        return _focal(input, target, weight, reduction, index, factor, gamma, sample_weight=sample_weight)
    if not same_shape(target.shape, input.shape):
        raise ValueError(f"probabilities must be of the input's shape {input.shape}, got {target.shape}")
    _route.tell_native("class probabilities in a focal loss")
    return _soft_focal(input, target, factor, weight, gamma, reduction, sample_weight)
