"""The softmax losses: for each the native formula, and the public function that routes it.

The formulas take ``wide``, ``second`` and ``zero`` as :func:`fusedloss._route.softmax` explains them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction

from . import _route
from ._dtypes import HALVES, in_float, widened

__all__ = ["cross_entropy", "focal_loss", "log_probs", "nll_loss"]


def _class_dim(logits: Tensor) -> int:
    return min(logits.dim() - 1, 1)


def _index(target: Tensor) -> Tensor:
    """In int64: not everything of torch that takes class indices takes them in bytes."""
    return target.long() if isinstance(target, Tensor) and target.dtype == torch.uint8 else target


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """cap * tanh(logits / cap); a mask of -infinity stays one."""
    return torch.where(logits == -torch.inf, logits, softcap * torch.tanh(logits / softcap)) if softcap else logits


def _reduced(losses: Tensor, divisor: Tensor, reduction: str, zero: bool) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # Over infinity a mean over nothing is 0, and so is its gradient.
    return losses.sum() / (torch.where(divisor == 0, torch.inf, divisor) if zero else divisor)


@_route.softmax("cross_entropy")
def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    target = _index(target)
    if not (z_loss or softcap or wide or second or zero):
        return F.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )
    z = _capped(in_float(logits), softcap)
    weight = weight if weight is None else weight.to(z.dtype)
    losses = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )  # fmt: skip
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    kept = target != ignore_index
    lse = z.logsumexp(_class_dim(z))
    if z_loss:
        losses = losses + torch.where(kept, z_loss * lse.square(), 0.0)
    divisor = kept.sum() if weight is None else weight[torch.where(kept, target, 0).long()].where(kept, 0.0).sum()
    dtype = z.dtype if widened(logits, wide) else logits.dtype
    loss = _reduced(losses, divisor, reduction, zero).to(dtype)
    return (loss, lse.to(dtype)) if second else loss


@_route.softmax("soft_cross_entropy", soft=True)
def _soft_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    if not (z_loss or softcap or wide or second):
        return F.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )
    z = _capped(in_float(logits), softcap)
    dtype = torch.promote_types(z.dtype if widened(logits, wide) else logits.dtype, target.dtype)
    target = target.to(torch.promote_types(z.dtype, target.dtype))
    losses = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )  # fmt: skip
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    lse = z.logsumexp(_class_dim(z))
    losses = losses + z_loss * lse.square()
    loss = losses.mean() if reduction == "mean" else _reduced(losses, losses, reduction, zero)
    return (loss.to(dtype), lse.to(dtype)) if second else loss.to(dtype)


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
    z_loss: float = 0.0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    all_ignored: str = "nan",
    return_lse: bool = False,
    grad_in_forward: bool | None = None,
    inplace: bool = False,
) -> Any:
    r"""Cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`.

    With :math:`\mathrm{lse} = \log \sum_c e^{x_c}`, smoothing :math:`\epsilon` and class indices y

    .. math:: \ell = (1 - \epsilon) \, w_y (\mathrm{lse} - x_y)
              + \tfrac{\epsilon}{C} \sum_c w_c (\mathrm{lse} - x_c) + \lambda \, \mathrm{lse}^2

    and with class probabilities t, smoothed to :math:`t_c (1 - \epsilon) + \epsilon / C`,

    .. math:: \ell = \sum_c w_c t_c (\mathrm{lse} - x_c) + \lambda \, \mathrm{lse}^2

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16, read in place whatever
            their strides.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8, or class probabilities of the input's shape, in
            its dtype or float32.
        weight: a factor for each of the C classes; the mean then divides by the sum of the targets' weights.
        ignore_index: class indices of this value count nowhere and get no gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: :math:`\epsilon` in [0, 1].
        z_loss: :math:`\lambda`, what is added times lse squared in every row that is not ignored.
        softcap: takes ``softcap * tanh(input / softcap)`` for the logits; a logit of -infinity stays a mask, and
            infinity caps nothing.
        out_dtype: of the results, computed in no lesser precision: ``torch.float32`` makes a float32 loss of bfloat16
            logits without a copy of them.
        all_ignored: ``"zero"`` makes a mean over nothing 0, with a gradient of 0, where torch's is ``"nan"``.
        return_lse: returns ``(loss, lse)``, the differentiable lse of every row, ignored ones too.
        grad_in_forward: ``True`` makes the gradient while forward has the logits at hand, one read and one write of
            them in all; backward then multiplies it by the upstream gradient, which costs nothing where that is 1 and
            a read and a write otherwise. ``False`` leaves it to backward: two reads and one write. ``None`` takes
            ``True`` on a CPU outside saved-tensor hooks (checkpointing, offloading), and else ``False``. A bfloat16
            gradient is made anew where the upstream gradient is no power of two, which would round it once more. No
            effect on float16 (an unscaled gradient would underflow), on ``reduction="none"``, beside ``return_lse``, or
            where nothing requires a gradient.
        inplace: lets the gradient overwrite the logits, so that training needs O(N) memory beyond them. They hold
            their values until backward, or only until this call returns with ``grad_in_forward=True``. The gradient
            that backward hands on is their memory: what is written to them later changes it. Without grad mode nothing
            is overwritten. Like ``grad_in_forward`` it is ignored where the call runs natively.

    Raises:
        IndexError: a target is out of range and not ``ignore_index``. On a GPU the loss is NaN instead, and the next
            forward outside a replayed graph or :func:`fusedloss.check` raises.
        RuntimeError: ``inplace=True`` with logits that are a leaf requiring grad or that overlap in memory, or a
            backward through overwritten logits: a second one, or one with ``create_graph=True``.
        ValueError: ``z_loss`` is negative, ``softcap`` is not positive, ``out_dtype`` or ``all_ignored`` is unknown.
        ValueError, RuntimeError: as torch, for shapes, dtypes and reductions that do not fit.

    >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, -100]))
    tensor(0.1269)
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    loss = _soft_cross_entropy if soft else _cross_entropy
    # A negative or NaN smoothing is none, as in torch.
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    if not (z_loss or softcap is not None or out_dtype or all_ignored != "nan" or return_lse):
        if grad_in_forward is None and not inplace:
            return loss(input, target, weight, reduction, ignore_index, smoothing, 0.0, 0.0)
        return loss(
            input, target, weight, reduction, ignore_index, smoothing, 0.0, 0.0,
            grad_in_forward=grad_in_forward, inplace=inplace,
        )  # fmt: skip

    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if all_ignored not in ("nan", "zero"):
        raise ValueError(f'all_ignored must be "nan" or "zero", got {all_ignored!r}')
    cap = 0.0 if softcap is None or softcap == math.inf else softcap
    dtype = input.dtype if out_dtype is None else out_dtype
    if not dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating point type, got {dtype}")
    # What is wider than the arithmetic of the kernels needs wider logits; what is narrower is rounded at the end.
    computed = torch.promote_types(input.dtype, dtype)
    wide = computed != input.dtype and computed == torch.float32
    if computed != input.dtype and not wide:
        input = input.to(computed)
        weight = weight if weight is None else weight.to(computed)
    result = loss(
        input, target, weight, reduction, ignore_index, smoothing, z_loss, cap,
        wide=wide, second=return_lse, zero=all_ignored == "zero", grad_in_forward=grad_in_forward, inplace=inplace,
    )  # fmt: skip
    if out_dtype is None:
        return result
    return tuple(each.to(out_dtype) for each in result) if return_lse else result.to(out_dtype)


@_route.softmax("nll")
def _nll(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Tensor:  # fmt: skip
    if wide:
        logits, weight = in_float(logits), weight if weight is None else in_float(weight)
    # torch's derivative refuses other strides
    return F.nll_loss(
        logits.contiguous(), _index(target), weight, ignore_index=ignore_index, reduction=reduction
    )  # fmt: skip


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
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _nll(input, target, weight, reduction, ignore_index)


@_route.softmax("focal")
def _focal(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    factor: float = 1.0, gamma: float = 2.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Tensor:  # fmt: skip
    x = in_float(logits)
    class_dim = _class_dim(x)
    # Picks, and rejects as torch does; its derivative knows no channels_last.
    target = _index(target)
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
    return _reduced(losses, kept.sum(), reduction, zero).to(x.dtype if widened(logits, wide) else logits.dtype)


def _soft_focal(logits: Tensor, target: Tensor, alpha: float | Tensor | None, gamma: float, reduction: str) -> Tensor:
    x = in_float(logits)
    class_dim = _class_dim(x)
    log_p = x.log_softmax(class_dim)
    losses = -target * log_p
    if gamma != 0:
        q = -torch.expm1(log_p)  # 1 - p, without the rounding of p
        losses = losses * torch.exp(gamma * q.clamp_min(torch.finfo(x.dtype).tiny).log())
    if isinstance(alpha, Tensor):
        losses = losses * alpha.to(x.dtype).view(-1, *[1] * (x.dim() - 1 - class_dim))
    elif alpha is not None:
        losses = losses * alpha
    losses = losses.sum(class_dim)
    if reduction != "none":
        losses = losses.mean() if reduction == "mean" else losses.sum()
    return losses.to(x.dtype if widened(logits) else logits.dtype)


def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax focal loss (Lin et al., "Focal Loss for Dense Object Detection", 2017).

    With p the softmax probability of the target,

    .. math:: \ell = \alpha_y \; (1 - p)^\gamma \; (-\log p)

    finite in value and gradient for every ``gamma >= 0`` and every finite logit. ``gamma=0, alpha=None`` is
    cross-entropy. Class probabilities t give :math:`\sum_c \alpha_c t_c (1 - p_c)^\gamma (-\log p_c)`, natively.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...), as for :func:`cross_entropy`.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8, or class probabilities of the input's shape.
        alpha: None, one factor, or a tensor of C class weights. The mean divides by the number of targets that are not
            ignored, never by the weights.
        gamma: focusing exponent, at least 0.
        ignore_index: class indices of this value count nowhere and get no gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``gamma`` is negative or NaN, ``alpha`` has the wrong length, ``reduction`` is unknown, or
            probabilities are not of the input's shape.
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.

    >>> focal_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    tensor(0.0018)
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if isinstance(alpha, Tensor):
        classes = input.shape[_class_dim(input)] if input.dim() else 0
        if alpha.shape != (classes,):
            raise ValueError(f"alpha must hold a weight for each of {classes} classes, got shape {tuple(alpha.shape)}")
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(f"probabilities must be of the input's shape {input.shape}, got {target.shape}")
        _route.tell_native("class probabilities in a focal loss")
        return _soft_focal(input, target, alpha, gamma, reduction)
    if isinstance(alpha, Tensor):
        return _focal(input, target, alpha, reduction, ignore_index, 1.0, gamma)
    return _focal(input, target, None, reduction, ignore_index, 1.0 if alpha is None else alpha, gamma)


@_route.softmax("log_probs")
def _log_probs(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    temperature: float = 1.0, entropy: float = 0.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    x = in_float(logits) / temperature
    class_dim = _class_dim(x)
    log_p = x.log_softmax(class_dim)
    target = _index(target)
    picked = -F.nll_loss(log_p.contiguous(), target, ignore_index=ignore_index, reduction="none")
    dtype = x.dtype if wide else logits.dtype
    value = _reduced(picked, (target != ignore_index).sum(), reduction, zero).to(dtype)
    if not second:
        return value
    # Finite, so that a masked class adds 0 * log 0 = 0.
    finite = log_p.clamp_min(torch.finfo(x.dtype).min)
    of_row = -(finite.exp() * finite).sum(class_dim)
    return value, torch.where(target == ignore_index, 0.0, of_row).to(dtype)


def log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Any:
    r"""Log-probability of the target at every position, and on request the entropy of the distribution there.

    With p the softmax of ``logits / temperature``,

    .. math:: \log p_y, \qquad H = -\sum_c p_c \log p_c

    from one read of the logits forward, and one read and one write of them backward: no log-softmax is ever in memory.

    Args:
        logits: (C), (N, C) or (N, C, d1, ...), as for :func:`cross_entropy`; a language model's (B, T, V) as
            ``logits.flatten(0, 1)``, which copies nothing.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8.
        temperature: what the logits are divided by; positive.
        ignore_index: at targets of this value both results are 0, and there is no gradient.
        return_entropy: returns ``(log_probs, entropy)``, both differentiable.

    Returns:
        In the target's shape, float32 for bfloat16 and float16 logits: rounded to 8 bits, no ratio of two
        probabilities would be left.

    Raises:
        ValueError: ``temperature`` is not positive.
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.

    >>> log_probs(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), return_entropy=True)
    (tensor([-0.1269]), tensor([0.3653]))
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _log_probs(
        logits, target, None, "none", ignore_index, temperature, float(return_entropy),
        wide=logits.dtype in HALVES, second=return_entropy,
    )  # fmt: skip
