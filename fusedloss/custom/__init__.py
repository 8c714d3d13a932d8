"""A user's own pointwise loss: an expression, compiled once into the kernels that the built-in losses run on.

The steps: _expression.py reads it, _stable.py rewrites it, _derivative.py derives the slopes, _printing.py prints all
three in C++, and _build.py compiles that.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _route
from .._dtypes import in_float, widened
from .._library import extension
from ..losses._elementwise import reduced, warn_of_broadcasting
from ._build import functor, library
from ._expression import Tree, evaluate, parse
from ._printing import text
from ._stable import stable

__all__ = ["PointwiseLoss", "pointwise_loss"]


class PointwiseLoss:
    """A loss made by :func:`pointwise_loss`: ``loss(input, target, reduction="mean", weight=None, **params)``.

    Attributes:
        name: its name, as given.
        value, grad, grad_target: the expressions of the loss and its slopes by x and t, as compiled.
        params: the defaults of its parameters.
        fused: whether it was compiled. Where not, it runs natively, and ``why_native`` says why.
    """

    def __init__(self, name: str, trees: tuple[Tree, Tree, Tree], params: Mapping[str, float]) -> None:
        self.name = name
        self.value, self.grad, self.grad_target = map(text, trees)
        self.params = dict(params)
        self.why_native = ""
        self._tree = trees[0]
        self._routed: _route.Formula = self._native

    @property
    def fused(self) -> bool:
        return not self.why_native

    def __call__(
        self, input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None, **params: float
    ) -> Tensor:
        """Computes the loss.

        Args:
            input: predictions x, any shape; float32, float64, bfloat16 or float16.
            target: t, of the same shape; another shape broadcasts, with torch's warning.
            reduction: ``"mean"`` (over all elements), ``"sum"`` or ``"none"``.
            weight: a factor that broadcasts to the input.
            params: parameters that differ from their defaults. Given as a tensor, one gets a gradient too, natively.

        Raises:
            TypeError: a parameter that the loss does not have.
            ValueError: an unknown ``reduction``.
        """
        if reduction not in _route.REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        if unknown := params.keys() - self.params.keys():
            known = ", ".join(self.params) or "none"
            raise TypeError(f"{self.name}: unknown parameter {min(unknown)}; its parameters: {known}")
        warn_of_broadcasting(input, target)
        return self._routed(input, target, weight, reduction, *{**self.params, **params}.values())

    def _native(self, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *params: float) -> Tensor:
        dtype = torch.promote_types(input.dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        x, t = in_float(input), in_float(target)
        losses = evaluate(self._tree, {"x": x, "t": t, **dict(zip(self.params, params, strict=True))})
        if weight is not None:
            losses = losses * weight
        return reduced(losses, reduction).to(losses.dtype if widened(input) else dtype)

    def _told_native(self, *arguments: Any) -> Tensor:
        _route.tell_native(self.why_native)
        return self._native(*arguments)

    def __reduce__(self) -> Any:
        return pointwise_loss, (self.name, self.value, self.grad, self.params)

    def __repr__(self) -> str:
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        return f"{self.name}(x, t{params}) = {self.value}\n  d/dx = {self.grad}\n  d/dt = {self.grad_target}"


_KNOWN: dict[str, PointwiseLoss] = {}


def pointwise_loss(
    name: str, value: str, grad: str | None = None, params: Mapping[str, float] | None = None
) -> PointwiseLoss:
    """Makes your own pointwise loss, which runs on the kernels of the built-in ones.

    :func:`torch.utils.cpp_extension.load_inline` compiles the expressions once, for the CPU and, where there is nvcc
    with a GPU (or a ``TORCH_CUDA_ARCH_LIST``), for CUDA. torch's extension cache keeps the result under a hash of its
    content. Without a C++ compiler the loss runs natively, with a warning.

    Args:
        name: the name of the loss, an identifier.
        value: the loss of a prediction ``x`` and a target ``t`` in the syntax of C++: numbers (all are real:
            1/2 is 0.5), ``+ - * /``, comparisons, ``c ? a : b``, and the functions abs, sign, sqrt, square, exp,
            expm1, log, log1p, sinh, cosh, tanh, log_cosh, sigmoid, softplus, sin, cos, atan, pow, min, max and clamp.
        grad: its slope by x in the same syntax. If it is left out, SymPy derives it. ``print(loss)`` shows it.
        params: the loss's parameters, eight at most, with their defaults; the expressions use them by name.

    Returns:
        A function of ``(input, target, reduction="mean", weight=None, **params)`` with derivatives of every order, to
        the input and to the target, that runs in float32, float64, bfloat16 and float16, under autocast, ``torch.func``
        and ``torch.compile``.

    Raises:
        ValueError: an unknown name or a mistake in an expression, before anything is compiled; a ``grad`` that does not
            agree with finite differences of the value.
        RuntimeError: the compiler refuses the expression.

    >>> pseudo_huber = pointwise_loss(
    ...     "pseudo_huber", "delta * delta * (sqrt(1 + square((x - t) / delta)) - 1)", params={"delta": 1.0}
    ... )
    >>> pseudo_huber(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]), "none", delta=2.0)
    tensor([0.1231, 3.2111])
    >>> print(pointwise_loss("log_cosh", "log(cosh(x - t))"))
    log_cosh(x, t) = log_cosh(x - t)
      d/dx = tanh(x - t)
      d/dt = -tanh(x - t)
    """
    params = dict(params or {})
    if not name.isidentifier():
        raise ValueError(f"expected an identifier for the name of a loss, got {name!r}")
    if len(params) > _MOST_PARAMS:
        raise ValueError(f"expected at most {_MOST_PARAMS} parameters, got {len(params)}")
    trees = _trees(value, grad, params)
    source = functor(trees, params)
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    op = f"custom_{name}_{digest}"
    if op not in _KNOWN:
        loss = PointwiseLoss(name, trees, params)
        address, loss.why_native = library(op, source, name)
        if address is None:
            loss._routed = loss._told_native
        else:
            assert extension is not None
            extension.add_pointwise(op, address)
            loss._routed = _route.pointwise(op, listed=False)(loss._native)
        _check(loss)
        _KNOWN[op] = loss
    loss = _KNOWN[op]
    if loss.params == params:
        return loss
    # The same expressions with other defaults need no second compilation.
    other = PointwiseLoss(name, trees, params)
    other._routed, other.why_native = loss._routed, loss.why_native
    return other


_MOST_PARAMS = 8  # the kernels' own number, which tests/contract/test_custom.py compares with this one


def _trees(value: str, grad: str | None, params: Mapping[str, float]) -> tuple[Tree, Tree, Tree]:
    """The value and its slopes by x and t."""
    from ._derivative import derivative  # imports SymPy, which takes half a second

    tree = stable(parse(value, params))
    by_input = derivative(tree, "x") if grad is None else stable(parse(grad, params))
    return tree, by_input, derivative(tree, "t")


def _check(loss: PointwiseLoss) -> None:
    """Compares the compiled value with the native one, and the slopes with finite differences, in float64."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(scale: float, offset: float) -> Tensor:
        return scale * torch.rand(256, generator=generator, dtype=torch.float64, device="cpu") + offset

    for x, t in (
        (random(6, -3), random(6, -3)),
        (random(0.9, 0.05), random(0.9, 0.05)),
        (random(4, 0.1), random(1, 0)),
    ):
        x, t = x.requires_grad_(), t.requires_grad_()
        with torch.enable_grad():
            got = loss._routed(x, t, None, "none", *loss.params.values())
            slopes = torch.autograd.grad(got.sum(), (x, t), allow_unused=True)
        native: Callable[..., Tensor] = lambda x, t: loss._native(x, t, None, "none", *loss.params.values())  # noqa: E731
        with torch.no_grad():
            _compare(loss, "value", loss.value, got, native(x, t), x, t, 1e-9)
            step = 1e-6
            by_input = (native(x + step, t) - native(x - step, t)) / (2 * step)
            by_target = (native(x, t + step) - native(x, t - step)) / (2 * step)
            for what, expression, slope, expected in (
                ("d/dx", loss.grad, slopes[0], by_input),
                ("d/dt", loss.grad_target, slopes[1], by_target),
            ):
                slope = torch.zeros_like(x) if slope is None else slope
                _compare(loss, what, expression, slope, expected, x, t, 1e-4)


def _compare(
    loss: PointwiseLoss, what: str, expression: str, got: Tensor, expected: Tensor, x: Tensor, t: Tensor, bound: float
) -> None:
    off = (got - expected).abs() > bound * (1 + expected.abs())
    off &= got.isfinite() & expected.isfinite()
    # A kink between the two points of a difference puts one or two of the 256 elements off; a mistake more.
    if off.sum() > 2:
        i = int(off.nonzero()[0])
        against = "PyTorch" if what == "value" else "a difference of values"
        raise ValueError(
            f"{loss.name}: {what} = {expression} is {got[i]:.6g} at x = {x[i]:.6g}, t = {t[i]:.6g}, "
            f"where {against} gives {expected[i]:.6g}"
        )
