"""Losses of distributions: the Kullback-Leibler divergence, and negative log-likelihoods of counts and of samples."""

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._sizes import same_shape
from .._warnings import warn
from ._elementwise import reduced

__all__ = ["gaussian_nll_loss", "kl_div", "poisson_nll_loss"]


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


def _raises_for_negative(var: Tensor) -> bool:
    """Whether the host may look at the variances: they are numbers on a CPU, that no transform or mode stands for."""
    if var.device.type != "cpu" or is_compiling() or hasattr(var, "fake_mode"):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and torch._C._len_torch_dispatch_stack() == 0


@_route.pointwise("gaussian_nll", left="few")
def _gaussian_nll(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, eps: float = 1e-6, full: float = 0.0,
    *, third: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """torch's formula, but that a negative variance that nobody is told of gives NaN."""
    given = input.new_ones(()) if third is None else third
    told = _raises_for_negative(given)
    if told and torch.any(given < 0):
        raise ValueError("var has negative entry/entries")
    var = given.clone()
    with torch.no_grad():
        var.clamp_(min=eps)
    losses = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        losses += 0.5 * math.log(2 * math.pi)
    if not told:
        losses = torch.where(given < 0, math.nan, losses)
    return reduced(losses if weight is None else losses * weight, reduction)


def _variance(input: Tensor, var: Tensor | float) -> Tensor | None:
    """The variance in a shape that broadcasts to the input; None where torch refuses it."""
    if isinstance(var, float):
        return None if var < 0 or not input.is_floating_point() else input.new_full((1,) * input.dim(), var)
    if same_shape(var.shape, input.shape):
        return var
    if same_shape(var.shape, input.shape[:-1]):
        return var.unsqueeze(-1)
    of_one = input.dim() == var.dim() and sum(b for a, b in zip(input.shape, var.shape, strict=True) if a != b) == 1
    return var if of_one else None


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood of normal samples, as :func:`torch.nn.functional.gaussian_nll_loss`.

    .. math:: \ell = \tfrac12 \left(\log v + \frac{(x - t)^2}{v}\right), \quad v = \max(\mathrm{var}, \epsilon)

    The bound is no matter to the gradient by the variance, as in torch.

    Args:
        input: expectations x, any shape and strides. float32, float64, bfloat16 and float16 run fused on the CPU and on
            CUDA; operands may differ in dtype where torch's result has the input's dtype or float32.
        target: samples t, of a shape that broadcasts with the input's, in a floating point or integer dtype.
        var: variances, at least 0, of the input's shape, of that shape with one size of 1, or without the last
            dimension; or one float for all.
        full: whether the constant :math:`\frac12 \log (2 \pi)` is added.
        eps: the least variance.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: a negative variance (on a CPU; on CUDA its loss is NaN, and the next such call or :func:`.check`
            raises), one of another shape, or an unknown ``reduction``.
        RuntimeError: the shapes do not broadcast.

    >>> gaussian_nll_loss(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0]))
    tensor(0.5966)
    """
    if has_torch_function_variadic(input, target, var) and _route.overrides_apply():
        return _route.overridden(
            gaussian_nll_loss, (input, target, var), input, target, var, full=full, eps=eps, reduction=reduction
        )
    tensors = isinstance(input, Tensor) and isinstance(var, Tensor | float)
    variance = _variance(input, var) if tensors else None
    if variance is None or reduction not in _route.REDUCTIONS or not isinstance(full, bool):
        _route.tell_native(_NO_BOOL if not isinstance(full, bool) else "a variance or reduction that torch refuses")
        return _torchs.gaussian_nll_loss(input, target, var, full, eps, reduction)
    return _gaussian_nll(input, target, None, reduction, eps, float(full), third=variance)
