"""A user's own loss: an expression, compiled once into the kernels that the built-in losses run on.

The steps: _expression.py reads it, _stable.py rewrites it, _derivative.py derives the slopes, _printing.py prints them
all in C++, _source.py puts that into files, _build.py compiles them, _cache.py keeps the result, and _check.py checks
it. Pointwise losses are here, those of rows in _rows.py, _stable_row.py and _check_rows.py.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route
from .._dtypes import in_float, widened
from .._library import extension
from .._one_hot import over_class_indices
from .._traced import asked_once
from ..losses._elementwise import INDEX_DTYPES, reduced, warn_of_broadcasting
from ..losses._numbers import NUMBERS, checked
from ._build import library
from ._check import Trees, as_expressed, as_routed, check
from ._definition import CHECKED, LOCK, PATHS, Definition, OwnLoss, Path, checked_params, names_known
from ._expression import OF_ELEMENT, OF_THREE, Tree, check_parameters, evaluate, names, parse
from ._printing import text
from ._rows import SoftmaxLoss, softmax_loss
from ._source import functor
from ._stable import stable

__all__ = ["PointwiseLoss", "PointwiseLossOfThree", "SoftmaxLoss", "pointwise_loss", "softmax_loss"]


class PointwiseLoss(OwnLoss):
    """A loss made by :func:`pointwise_loss`.

    ``loss(input, target, reduction="mean", weight=None, ignore_index=None, **params)``. A module without parameters and
    buffers. Copied or pickled, it is made anew from its expressions.

    Attributes:
        name: its name, as given.
        value: the expression of the loss, as compiled.
        grad: that of its slope by x.
        grad_target: that of its slope by t.
        grad_third: that of its slope by v, None for a loss without v.
        params: the defaults of its parameters.
        fused: whether it was compiled. Where not, it runs natively, and ``why_native`` says why.
    """

    def __init__(self, name: str, trees: Trees, params: Mapping[str, float], path: Path) -> None:
        super().__init__()
        self.name = name
        self.value, self.grad, self.grad_target, *third = map(text, trees)
        self.grad_third = third[0] if third else None
        self.params = dict(params)
        self._native, self._routed, self.why_native = path
        self._finite_at_zero = asked_once(_finite_at_zero(trees[0], tuple(params)))
        _MADE[self._definition] = self

    def forward(
        self, input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None,
        ignore_index: int | None = None, **params: float,
    ) -> Tensor:  # fmt: skip
        """Computes the loss.

        Args:
            input: predictions x, any shape; float32, float64, bfloat16 or float16.
            target: t, of the same shape; another shape broadcasts, with torch's warning. With an ``ignore_index``:
                class indices y (N) or (N, d1, ...) of an input (N, C) or (N, C, d1, ...), which stand for their
                one-hot: t is 1 in column y and 0 in the others. C, like every negative number, names no column.
            reduction: ``"mean"`` (over all elements), ``"sum"`` or ``"none"``.
            weight: a factor that broadcasts to the input.
            ignore_index: targets are class indices, and rows of this one count nowhere, whatever their input.
            params: parameters that differ from their defaults. Given as a tensor, one gets a gradient too, natively.

        Raises:
            TypeError: a parameter that the loss does not have, or one that is no number; an ``ignore_index`` that is no
                int, or beside targets that are no integers.
            ValueError: an unknown ``reduction``, or class indices that do not fit the input.
            IndexError: a class index above C that is not ignored; on a GPU as for
                :func:`fusedloss.functional.cross_entropy`.
        """
        return self._run(input, target, None, reduction, weight, params, ignore_index)

    def _run(
        self, input: Tensor, target: Tensor, third: Tensor | None, reduction: str, weight: Tensor | None,
        params: dict[str, float], ignore_index: int | None = None,
    ) -> Tensor:  # fmt: skip
        tensors = (input, target, weight, third)
        if has_torch_function_variadic(*tensors) and _route.overrides_apply():
            given = {**self.params, **params}
            return _route.overridden(
                _call, tensors, input, target, reduction, weight, given, self._definition, third, ignore_index
            )  # fmt: skip
        if reduction not in _route.REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        names_known(self.name, params, self.params)
        if ignore_index is not None:
            return self._of_class_indices(input, target, reduction, weight, params, ignore_index)
        warn_of_broadcasting(input, target, stacklevel=6)
        call = (input, target, weight, reduction, *{**self.params, **params}.values())
        return self._routed(*call) if third is None else self._routed(*call, third=third)

    def _of_class_indices(
        self, input: Tensor, target: Tensor, reduction: str, weight: Tensor | None, params: dict[str, float],
        ignore_index: Any,
    ) -> Tensor:  # fmt: skip
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
            raise TypeError(f"{self.name}(): argument 'ignore_index' must be int, not {type(ignore_index).__name__}")
        if target.dtype not in INDEX_DTYPES:
            expected = "class indices for targets beside an ignore_index"
            raise TypeError(f"{self.name}: expected {expected}, got a target of {target.dtype}")
        values = tuple({**self.params, **params}.values())
        call = (input, target.long(), weight, reduction, *values)
        # The kernels take an ignored row for zeros of weight 0. What is no number takes care of itself.
        if self.fused and all(isinstance(value, NUMBERS) for value in values):
            finite, _ = self._finite_at_zero((), values)
            if not finite:
                _route.tell_native("class indices, and no finite value at x = 0 and t = 0")
                return self._native(*call, ignore_index=ignore_index)
        return self._routed(*call, ignore_index=ignore_index)

    def __reduce__(self) -> Any:
        return _made, self._definition, self._undefined(_DEFINED)

    def __repr__(self) -> str:
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        slopes = {"x": self.grad, "t": self.grad_target, "v": self.grad_third}
        known = {name: slope for name, slope in slopes.items() if slope is not None}
        lines = "".join(f"\n  d/d{name} = {slope}" for name, slope in known.items())
        return f"{self.name}({', '.join(known)}{params}) = {self.value}{lines}"


class PointwiseLossOfThree(PointwiseLoss):
    """A loss made by :func:`pointwise_loss` of three operands.

    ``loss(input, target, third, reduction="mean", weight=None, **params)``, with gradients to all three.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, third: Tensor, reduction: str = "mean", weight: Tensor | None = None,
        **params: float,
    ) -> Tensor:  # fmt: skip
        """Computes the loss, as :meth:`PointwiseLoss.forward` does; the third operand v broadcasts too."""
        if not isinstance(third, Tensor):
            raise TypeError(f"{self.name}(): argument 'third' must be Tensor, not {type(third).__name__}")
        return self._run(input, target, third, reduction, weight, params)


# The attributes that follow from the definition.
_DEFINED = (
    "name", "value", "grad", "grad_target", "grad_third", "params", "why_native", "_native", "_routed",
    "_finite_at_zero",
)  # fmt: skip
_MADE: dict[Definition, PointwiseLoss] = {}


def _made(name: str, value: str, grad: str, params: tuple[tuple[str, float], ...]) -> PointwiseLoss:
    return pointwise_loss(name, value, grad, dict(params))


def _call(
    input: Tensor, target: Tensor, reduction: str, weight: Tensor | None, params: dict[str, float],
    definition: Definition, third: Tensor | None = None, ignore_index: int | None = None,
) -> Tensor:  # fmt: skip
    """A call of a loss as ``__torch_function__`` sees it: a function that a graph of torch.fx can hold and pickle."""
    loss = _MADE[definition] if definition in _MADE else _made(*definition)
    return loss._run(input, target, third, reduction, weight, params, ignore_index)


def _finite_at_zero(tree: Tree, parameters: tuple[str, ...]) -> Callable[..., bool]:
    @lru_cache
    def finite(*values: float) -> bool:
        point = {"x": 0.0, "t": 0.0, "v": 0.0, **dict(zip(parameters, values, strict=True))}
        return math.isfinite(float(evaluate(tree, point)))

    return finite


def pointwise_loss(
    name: str, value: str, grad: str | None = None, params: Mapping[str, float] | None = None
) -> PointwiseLoss:
    """Makes your own pointwise loss, which runs on the kernels of the built-in ones.

    :func:`torch.utils.cpp_extension.load` compiles the expressions once, for the CPU and, where there is nvcc with a
    GPU (or a ``TORCH_CUDA_ARCH_LIST``), for CUDA. torch's extension cache keeps the result under a hash of its content.
    Without a C++ compiler, ninja or a folder for the cache the loss runs natively, with a warning.

    Args:
        name: the name of the loss, an identifier of at most 100 letters.
        value: the loss of a prediction ``x`` and a target ``t`` in the syntax of C++: numbers (all are real:
            1/2 is 0.5), ``+ - * /``, comparisons, ``c ? a : b``, and the functions abs, sign, sqrt, square, exp,
            expm1, log, log1p, sinh, cosh, tanh, log_cosh, sigmoid, softplus, sin, cos, atan, pow, min, max and clamp.
            An expression may name ``v`` too, a third operand, such as the variance of :class:`.GaussianNLLLoss` or the
            label of :class:`.MarginRankingLoss`; where a parameter is called v, v is that.
        grad: its slope by x in the same syntax. If it is left out, SymPy derives it. ``print(loss)`` shows it.
        params: the loss's parameters, eight at most, with their defaults; the expressions use them by name.

    Returns:
        A module, called with ``(input, target, reduction="mean", weight=None, ignore_index=None, **params)``, where an
        ``ignore_index`` says that targets are class indices, which need no one-hot. If the expression names v, it is
        called with ``(input, target, third, reduction="mean", weight=None, **params)``. It has derivatives of every
        order, to all operands, and runs in float32, float64, bfloat16 and float16, under autocast, ``torch.func`` and
        ``torch.compile``.

    Raises:
        ValueError: an unknown name or a mistake in an expression, or a ``grad`` that does not agree with finite
            differences of the value, before anything is compiled.
        TypeError: a default that is no number.
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
    params = checked_params(name, params or {}, OF_ELEMENT, MOST_PARAMS)
    try:
        trees = _trees(value, grad, params)
        if len(trees) == 4:
            check_parameters(params, OF_THREE)
        source = functor(trees, params)
    except RecursionError:
        raise ValueError("the expression is nested too deeply, or has too many terms") from None
    op = f"custom_{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    native = _formula(name, trees[0], tuple(params))
    with LOCK:
        if op not in CHECKED:
            check(name, trees, params, as_expressed(trees, params))  # before a compiler runs
        if op not in PATHS:
            PATHS[op] = _path(op, source, name, native)
        path = PATHS[op]
        if op not in CHECKED:
            check(name, trees, params, as_routed(path.routed, params))
            CHECKED.add(op)
    return (PointwiseLossOfThree if len(trees) == 4 else PointwiseLoss)(name, trees, params, path)


MOST_PARAMS = 8  # the kernels' own number, which tests/contract/test_custom.py compares with this one


def _trees(value: str, grad: str | None, params: Mapping[str, float]) -> Trees:
    from ._derivative import derivative  # imports SymPy, which takes half a second

    known = OF_ELEMENT if "v" in params else OF_THREE
    tree = stable(parse(value, params, known))
    operands = known.names if "v" in names(tree) and known is OF_THREE else OF_ELEMENT.names
    by_input = derivative(tree, "x", operands) if grad is None else stable(parse(grad, params, known))
    return tree, by_input, *(derivative(tree, operand, operands) for operand in operands[1:])


def _formula(name: str, tree: Tree, parameters: tuple[str, ...]) -> _route.Formula:
    def native(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *params: Any, third: Tensor | None = None
    ) -> Tensor:
        dtype = torch.promote_types(input.dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        values: dict[str, Any] = {"x": in_float(input), "t": in_float(target)}
        if third is not None:
            values["v"] = in_float(third)
            dtype = torch.promote_types(dtype, third.dtype)
        for parameter, value in zip(parameters, params, strict=True):
            values[parameter] = value if isinstance(value, NUMBERS) else checked(name, parameter, value)
        losses = evaluate(tree, values)
        if weight is not None:
            losses = losses * weight
        return reduced(losses, reduction).to(losses.dtype if widened(input) else dtype)

    return native


def _path(op: str, source: str, name: str, native: _route.Formula) -> Path:
    whole = over_class_indices(native)
    address, why_native = library(op, source, name)
    if address is not None:
        assert extension is not None
        if op not in extension.losses:  # where an interrupted definition has made it
            extension.add_pointwise(op, address)
        return Path(whole, _route.pointwise(op, class_indices=True, listed=False)(native), "")

    def told(*arguments: Any, **options: Any) -> Tensor:
        _route.tell_native(why_native)
        return whole(*arguments, **options)

    return Path(whole, told, why_native)
