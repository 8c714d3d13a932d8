"""Asymmetric loss of multi-label classification."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route
from .._dtypes import in_float, widened
from .._sizes import same_shape
from ._elementwise import INDEX_DTYPES, check_broadcasts, reduced
from ._numbers import NUMBERS, checked, refuse_others

__all__ = ["asymmetric_loss"]


def of_elements(x: Tensor, t: Tensor, gamma_neg: float, gamma_pos: float, clip: float) -> Tensor:
    """The losses of the elements."""
    p, q, other = torch.sigmoid(x), torch.sigmoid(-x), 1 - t
    if clip == 0:
        pm, of_zero = p, F.softplus(x)
    else:
        counts = p > clip
        pm = torch.where(counts, p - clip, 0)
        # Each logarithm is differentiated where it is a number, and taken where it is precise.
        of_zero = torch.where(pm < 0.5, -torch.log1p(-pm.clamp_max(0.5)), -torch.log(q + clip))
        of_zero = torch.where(counts, of_zero, 0)
    ce = t * F.softplus(-x) + other * of_zero
    if gamma_neg == 0 and gamma_pos == 0:
        return ce
    gamma = gamma_neg + (gamma_pos - gamma_neg) * t
    m = t * q + other * pm
    # The derivatives of exp(gamma log m) are bounded; those of m^gamma divide by m.
    some = m > 0
    modulation = torch.exp(gamma * torch.log(torch.where(some, m, 1)))
    return torch.where(some, modulation, (gamma == 0).to(x.dtype)) * ce


@_route.pointwise("asymmetric", class_indices=True)
def _asymmetric(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
) -> Tensor:
    x = in_float(input)
    t = target.to(x.dtype)
    if not same_shape(x.shape, t.shape):
        raise ValueError(f"Target size ({t.shape}) must be the same as input size ({x.shape})")
    losses = of_elements(x, t, gamma_neg, gamma_pos, clip)
    if weight is not None:
        losses = losses * weight
    return reduced(losses, reduction).to(x.dtype if widened(input) else input.dtype)


def exponents_and_margin(name: str, gamma_neg: float, gamma_pos: float, clip: float) -> tuple[float, float, float]:
    """The parameters of a loss or a module of that name, in range."""
    if not isinstance(gamma_neg, NUMBERS):
        gamma_neg = checked(name, "gamma_neg", gamma_neg)
    if not isinstance(gamma_pos, NUMBERS):
        gamma_pos = checked(name, "gamma_pos", gamma_pos)
    if not isinstance(clip, NUMBERS):
        clip = checked(name, "clip", clip)
    for what, gamma in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        if not gamma >= 0:
            raise ValueError(f"{what} must be at least 0, got {gamma}")
    if not 0 <= clip <= 1:
        raise ValueError(f"clip must lie between 0 and 1, got {clip}")
    return gamma_neg, gamma_pos, clip


def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    reduction: str = "sum",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Asymmetric loss of multi-label classification, with the defaults of its authors.

    With p the sigmoid of the input, t its target, :math:`p_m = \max(p - clip, 0)`,
    :math:`m = (1 - p) t + p_m (1 - t)` and :math:`\gamma = \gamma_{pos} t + \gamma_{neg} (1 - t)`

    .. math:: \ell = w \; m^\gamma \; (-t \log p - (1 - t) \log (1 - p_m))

    from Ridnik et al., "Asymmetric Loss For Multi-Label Classification" (2021). Their code bounds the logarithms at
    that of 1e-8, so that a positive of a logit below -18.4 gets no gradient; here there is no such bound.

    Args:
        input: logits, any shape; (N, C) or (N, C, d1, ...) for class indices. float32, float64, bfloat16 and float16
            run fused on the CPU and on CUDA.
        target: of the same shape, in [0, 1]. Or class indices (N) or (N, d1, ...), as
            :func:`fusedloss.functional.sigmoid_focal_loss` takes them.
        gamma_neg: exponent of negatives, at least 0.
        gamma_pos: exponent of positives, at least 0.
        clip: what is taken off the probability of a negative, from 0 to 1; 0 for nothing.
        reduction: ``"none"`` (the shape of the input), ``"sum"``, or ``"mean"`` over all elements that are not ignored.
        weight: a factor w that broadcasts to the input, such as one for each class.
        ignore_index: class indices of this value count nowhere and get no gradient, whatever the logits.

    Raises:
        ValueError: a parameter is out of range or NaN, ``reduction`` is unknown, or the shapes do not fit.
        TypeError: a parameter is no number, nor a tensor of one.
        IndexError: a class index is above C and not ``ignore_index``. On a GPU the losses of its row are NaN instead,
            and the next forward outside a replayed graph or :func:`fusedloss.check` raises.

    >>> asymmetric_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), reduction="none")
    tensor([0.3466, 0.0245])

    A negative of a probability below the margin costs nothing:

    >>> asymmetric_loss(torch.tensor([-3.0]), torch.tensor([0.0]))
    tensor(0.)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            asymmetric_loss, (input, target, weight), input, target, gamma_neg=gamma_neg, gamma_pos=gamma_pos,
            clip=clip, reduction=reduction, weight=weight, ignore_index=ignore_index,
        )  # fmt: skip
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        refuse_others("asymmetric_loss", input=input, target=target)
    params = exponents_and_margin("asymmetric_loss", gamma_neg, gamma_pos, clip)
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    check_broadcasts("weight", weight, input)
    if target.dtype in INDEX_DTYPES and not same_shape(target.shape, input.shape):
        return _asymmetric(input, target.long(), weight, reduction, *params, ignore_index=ignore_index)
    return _asymmetric(input, target, weight, reduction, *params)
