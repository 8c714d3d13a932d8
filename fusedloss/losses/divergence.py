"""Losses of distributions: the Kullback-Leibler divergence, and the negative log-likelihood of counts."""

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._warnings import warn
from ._elementwise import reduced

__all__ = ["kl_div", "poisson_nll_loss"]


_NO_BOOL = "a choice that is no bool"  # which torch refuses


# Below torch's function, which would warn of a mean a second time.
def _divergence(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, log_target: bool) -> Tensor:
    if weight is not None:
        return reduced(torch.kl_div(input, target, 0, log_target=log_target) * weight, reduction)
    return torch.kl_div(input, target, _Reduction.get_enum(reduction), log_target=log_target)


@_route.pointwise("kl_div", left="few")
def _kl_div(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _divergence(input, target, weight, reduction, False)


@_route.pointwise("kl_div_log_target", left="few")
def _kl_div_log_target(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _divergence(input, target, weight, reduction, True)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence, as :func:`torch.nn.functional.kl_div`.

    .. math:: \ell = t \, (\log t - x)

    A probability t = 0 adds 0.

    Args:
        input: log-probabilities x, any shape and strides. float32, float64, bfloat16 and float16 run fused on the CPU
            and on CUDA; input and target may differ in dtype where torch's result has the input's dtype or float32.
        target: probabilities t, of a shape that broadcasts with the input's.
        reduction: ``"batchmean"`` (the sum over the size of the first dimension), ``"sum"``, ``"none"``, or ``"mean"``
            (over all elements, with torch's warning).
        log_target: whether the target holds log t in place of t.

    Raises:
        RuntimeError: the shapes do not broadcast, or a dtype is no floating point one.
        ValueError: an unknown ``reduction``.

    >>> kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]), reduction="batchmean")
    tensor(0.3681)
    """
    if has_torch_function_variadic(input, target) and _route.overrides_apply():
        return _route.overridden(
            kl_div, (input, target), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, log_target=log_target,
        )  # fmt: skip
    kind = "sum" if reduction == "batchmean" else reduction
    if size_average is not None or reduce is not None:
        kind = _Reduction.legacy_get_string(size_average, reduce)
    elif reduction == "mean" and not is_compiling():  # a warning would break the graph
        warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=2,
        )
    if not isinstance(log_target, bool):
        _route.tell_native(_NO_BOOL)
        loss = _divergence(input, target, None, kind, log_target)
    else:
        loss = (_kl_div_log_target if log_target else _kl_div)(input, target, None, kind)
    return loss / input.size()[0] if reduction == "batchmean" and input.dim() != 0 else loss


def _likelihood(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, log_input: bool, full: bool, eps: float
) -> Tensor:
    kind = reduction if weight is None else "none"
    loss = _torchs.poisson_nll_loss(input, target, log_input, full, eps=eps, reduction=kind)
    return loss if weight is None else reduced(loss * weight, reduction)


@_route.pointwise("poisson_nll", left="few")
def _poisson_nll(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, full: float = 0.0) -> Tensor:
    return _likelihood(input, target, weight, reduction, True, full != 0, 1e-8)


@_route.pointwise("poisson_nll_rate", left="few", positive=True)
def _poisson_nll_rate(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, eps: float = 1e-8, full: float = 0.0
) -> Tensor:
    return _likelihood(input, target, weight, reduction, False, full != 0, eps)


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of counts under a Poisson distribution, as :func:`torch.nn.functional.poisson_nll_loss`.

    .. math:: \ell = e^x - t x \quad \text{or} \quad x - t \log (x + \epsilon)

    Args:
        input: x, the logarithm of the expectation or, with ``log_input=False``, the expectation itself. Any shape and
            strides; float32, float64, bfloat16 and float16 run fused on the CPU and on CUDA.
        target: counts t, of a shape that broadcasts with the input's, in a floating point or integer dtype. Input and
            target may differ in dtype where torch's result has the input's dtype or float32.
        log_input: which of the two x is.
        full: whether :math:`t \log t - t + \frac12 \log (2 \pi t)`, Stirling's approximation of log t!, is added where
            t > 1.
        eps: what is added to an expectation before its logarithm is taken.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: the shapes do not broadcast.
        ValueError: an unknown ``reduction``.

    >>> poisson_nll_loss(torch.tensor([0.0, 1.0]), torch.tensor([2, 3]))
    tensor(0.3591)
    """
    if has_torch_function_variadic(input, target) and _route.overrides_apply():
        return _route.overridden(
            poisson_nll_loss, (input, target), input, target, log_input=log_input, full=full,
            size_average=size_average, eps=eps, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if reduction not in _route.REDUCTIONS:
        raise ValueError(reduction + " is not a valid value for reduction")
    if not (isinstance(log_input, bool) and isinstance(full, bool)):
        _route.tell_native(_NO_BOOL)
        return _likelihood(input, target, None, reduction, log_input, full, eps)
    if log_input:
        return _poisson_nll(input, target, None, reduction, float(full))
    return _poisson_nll_rate(input, target, None, reduction, eps, float(full))
