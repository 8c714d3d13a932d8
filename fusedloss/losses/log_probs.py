"""Log-probability of the target, and the entropy of the distribution."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import HALVES, in_float, widened
from ._dtensors import is_dtensor, served
from ._numbers import NUMBERS, checked
from ._rows import class_dim, class_index, reduced

__all__ = ["log_probs"]


@_route.softmax("log_probs")
def _log_probs(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    temperature: float = 1.0, entropy: float = 0.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    x = in_float(logits) / temperature
    dim = class_dim(x)
    log_p = x.log_softmax(dim)
    target = class_index(target)
    picked = -_torchs.nll_loss(log_p.contiguous(), target, ignore_index=ignore_index, reduction="none")
    dtype = x.dtype if widened(logits, wide) else logits.dtype
    value = reduced(picked, (target != ignore_index).sum(), reduction, zero).to(dtype)
    if not second:
        return value
    # Finite, because a masked class would add 0 * -infinity = NaN.
    finite = log_p.clamp_min(torch.finfo(x.dtype).min)
    entropies = -(finite.exp() * finite).sum(dim)
    return value, torch.where(target == ignore_index, 0.0, entropies).to(dtype)


# fmt: off
@overload
def log_probs(
    logits: Tensor, target: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...

@overload
def log_probs(
    logits: Tensor, target: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...

@overload
def log_probs(
    logits: Tensor, target: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on


def log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Any:
    r"""Log-probability of the target of every row, and on request the entropy of the row's distribution.

    With p the softmax of ``logits / temperature``,

    .. math:: \log p_y, \qquad H = -\sum_c p_c \log p_c

    Forward reads the logits once; backward reads them once and writes their gradient. No log-softmax is ever in memory.

    Args:
        logits: (C), (N, C) or (N, C, d1, ...), as for :func:`cross_entropy`; a language model's (B, T, V) as
            ``logits.flatten(0, 1)``, which copies nothing.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8.
        temperature: divides the logits; positive.
        ignore_index: where a target has this value, both results are 0 and give no gradient.
        return_entropy: returns ``(log_probs, entropy)``, both differentiable.

    Returns:
        In the target's shape; in float32 for bfloat16 and float16 logits, because log-probabilities rounded to 8 bits
        are too coarse for the ratio of two probabilities.

    Raises:
        ValueError: ``temperature`` is not positive.
        TypeError: ``temperature`` is no number, nor a tensor of one.
        IndexError: a target is out of range and not ``ignore_index``; on a GPU as for :func:`cross_entropy`.

    >>> log_probs(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), return_entropy=True)
    (tensor([-0.1269]), tensor([0.3653]))
    """
    if has_torch_function_variadic(logits, target) and _route.overrides_apply():
        return _route.overridden(
            log_probs, (logits, target), logits, target,
            temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy,
        )  # fmt: skip
    if is_dtensor(logits):
        options = {"temperature": temperature, "ignore_index": ignore_index, "return_entropy": return_entropy}
        made = served("log_probs", logits, {"target": target}, options)
        if made is not None:
            return made
    if not isinstance(temperature, NUMBERS):
        temperature = checked("log_probs", "temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _log_probs(
        logits, target, None, "none", ignore_index, temperature, float(return_entropy),
        wide=logits.dtype in HALVES, second=return_entropy,
    )  # fmt: skip
