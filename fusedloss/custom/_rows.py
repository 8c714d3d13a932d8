"""A user's own loss of rows of logits, over class indices."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import in_float, widened
from .._library import extension
from ..losses._ignored import IgnoreIndex, is_one, with_one_index
from ..losses._numbers import NUMBERS, checked
from ..losses._rows import class_dim, class_index, reduced
from ..losses.focal import log_odds_against
from ._build import library
from ._check_rows import check_routed, check_slopes
from ._definition import CHECKED, LOCK, PATHS, Definition, OwnLoss, Path, checked_params, names_known
from ._expression import OF_ROW, Tree, evaluate, names, number, parse, renamed
from ._printing import text
from ._source import RowTrees, of_rows, row_functor
from ._stable_row import stable_in_row

MOST_PARAMS = 7  # the kernels' own number, less the label smoothing


class SoftmaxLoss(OwnLoss):
    """A loss made by :func:`softmax_loss`.

    ``loss(input, target, reduction="mean", weight=None, ignore_index=-100, label_smoothing=0.0, sample_weight=None,
    **params)``. A module without parameters and buffers. Copied or pickled, it is made anew from its expressions.

    Attributes:
        name: its name, as given.
        value, grad: the expressions of the loss and its slope by ce, as compiled.
        params: the defaults of its parameters.
        fused: whether it was compiled. Where not, it runs natively, and ``why_native`` says why.
    """

    def __init__(self, name: str, value: Tree, grad: Tree, params: Mapping[str, float], path: Path) -> None:
        super().__init__()
        self.name = name
        self.value, self.grad = text(value), text(grad)
        self.params = dict(params)
        self._names = names(value)
        self._native, self._routed, self.why_native = path
        _MADE[self._definition] = self

    def forward(
        self, input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None,
        ignore_index: IgnoreIndex = -100, label_smoothing: float = 0.0, sample_weight: Tensor | None = None,
        **params: float,
    ) -> Tensor:  # fmt: skip
        """Computes the loss.

        Args:
            input: logits (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16.
            target: class indices (), (N) or (N, d1, ...) in int64 or uint8.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean divides by the number of rows that are not ignored,
                never by the weights of classes.
            weight: a weight for each class.
            ignore_index: rows of this class index or of one of several, or of a mask, as for
                :func:`fusedloss.functional.cross_entropy`, count nowhere.
            label_smoothing: in [0, 1], of ce alone. p and q are those of the target, whatever the smoothing.
            sample_weight: a factor for each row, as for :func:`fusedloss.functional.cross_entropy`.
            params: parameters that differ from their defaults. Given as a tensor, one gets a gradient too, natively.

        Raises:
            TypeError: a parameter that the loss does not have, one that is no number, a weight that is no tensor, or a
                floating point target.
            ValueError: an unknown ``reduction``, a weight of another length than there are classes, a label smoothing
                outside [0, 1], or one of an expression without ce.
            IndexError: a target is out of range and not ignored; on a GPU as for
                :func:`fusedloss.functional.cross_entropy`.
        """
        if has_torch_function_variadic(input, target, weight, sample_weight) and _route.overrides_apply():
            given = {**self.params, **params}
            return _route.overridden(
                _call, (input, target, weight, sample_weight), input, target, reduction, weight, ignore_index,
                label_smoothing, sample_weight, given, self._definition,
            )  # fmt: skip
        if reduction not in _route.REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        names_known(self.name, params, self.params)
        if not isinstance(label_smoothing, NUMBERS):
            label_smoothing = checked(self.name, "label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
        if label_smoothing != 0 and "ce" not in self._names:
            raise ValueError(f"{self.name}: label_smoothing smooths ce, which {self.value} does not name")
        if weight is not None:
            self._check_weight(weight, input)
        if target.is_floating_point():
            raise TypeError(f"{self.name}: expected class indices for targets, got a target of {target.dtype}")
        index: Any = ignore_index
        if type(index) is not int and not is_one(index):
            target, index, sample_weight = with_one_index(self.name, input, target, index, sample_weight)
        call = (input, target, weight, reduction, index, label_smoothing, *{**self.params, **params}.values())
        return self._routed(*call) if sample_weight is None else self._routed(*call, sample_weight=sample_weight)

    def _check_weight(self, weight: Any, input: Tensor) -> None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{self.name}(): argument 'weight' must be Tensor, not {type(weight).__name__}")
        classes = input.shape[class_dim(input)] if input.dim() else 0
        if weight.shape != (classes,):
            raise ValueError(
                f"{self.name}: weight must hold one of each of {classes} classes, got shape {tuple(weight.shape)}"
            )

    def __reduce__(self) -> Any:
        return _made, self._definition, self._undefined(_DEFINED)

    def __repr__(self) -> str:
        operands = ", ".join(name for name in OF_ROW.names if name in self._names)
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        return f"{self.name}({operands}{params}) = {self.value}\n  d/dce = {self.grad}"


# The attributes that follow from the definition.
_DEFINED = ("name", "value", "grad", "params", "why_native", "_names", "_native", "_routed")
_MADE: dict[Definition, SoftmaxLoss] = {}


def _made(name: str, value: str, grad: str, params: tuple[tuple[str, float], ...]) -> SoftmaxLoss:
    return softmax_loss(name, value, grad, dict(params))


def _call(
    input: Tensor, target: Tensor, reduction: str, weight: Tensor | None, ignore_index: Any, label_smoothing: float,
    sample_weight: Tensor | None, params: dict[str, float], definition: Definition,
) -> Tensor:  # fmt: skip
    """A call of a loss as ``__torch_function__`` sees it: a function that a graph of torch.fx can hold and pickle."""
    loss = _MADE[definition] if definition in _MADE else _made(*definition)
    return loss.forward(input, target, reduction, weight, ignore_index, label_smoothing, sample_weight, **params)


def softmax_loss(
    name: str, value: str, grad: str | None = None, params: Mapping[str, float] | None = None
) -> SoftmaxLoss:
    """Makes your own loss of rows of logits over class indices, which runs on the kernels of the built-in ones.

    The expression is compiled, kept and checked as that of :func:`pointwise_loss` is, in the same syntax.

    Args:
        name: the name of the loss, an identifier of at most 100 letters.
        value: the loss of a row, an expression of

            - ``p``, the probability of the target, and ``q``, which is 1 - p with all its digits;
            - ``ce``, the cross-entropy, which is -log p unless a call gives a ``label_smoothing``; and ``nll``, which
              is -log p in any case;
            - ``lse``, the log-sum-exp of the logits;
            - ``weight``, that of the target's class, or 1. An expression that does not name it is multiplied by it.

            1 - p is read as q, and a power of p as one of e^-nll, so that neither loses digits.
        grad: its slope by ce where ce is not smoothed, in the same syntax; p and q depend on ce, by slopes of -p and p.
            If it is left out, SymPy derives it. ``print(loss)`` shows it.
        params: the loss's parameters, seven at most, with their defaults; the expressions use them by name.

    Returns:
        A module, called with ``(input, target, reduction="mean", weight=None, ignore_index=-100, label_smoothing=0.0,
        sample_weight=None, **params)``. It has derivatives of every order, and runs in float32, float64, bfloat16 and
        float16, under autocast, ``torch.func`` and ``torch.compile``.

    Raises:
        ValueError: an unknown name or a mistake in an expression, or a ``grad`` that does not agree with finite
            differences of the value, before anything is compiled.
        TypeError: a default that is no number.
        RuntimeError: the compiler refuses the expression.

    >>> poly = softmax_loss("poly1", "alpha * ce + epsilon * (1 - p)", params={"alpha": 1.0, "epsilon": 1.0})
    >>> poly(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), epsilon=2.0)
    tensor(0.3653)
    >>> print(poly)
    poly1(ce, q, alpha=1.0, epsilon=1.0) = alpha * ce + epsilon * q
      d/dce = alpha + epsilon * p
    """
    params = checked_params(name, params or {}, OF_ROW, MOST_PARAMS)
    try:
        value_tree, grad_tree, trees = _trees(value, grad, params)
        source = row_functor(trees, params)
    except RecursionError:
        raise ValueError("the expression is nested too deeply, or has too many terms") from None
    op = f"custom_{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    native = _formula(name, trees.value, tuple(params))
    with LOCK:
        if op not in CHECKED:
            check_slopes(name, trees, params)  # before a compiler runs
        if op not in PATHS:
            PATHS[op] = _path(op, source, name, native)
        path = PATHS[op]
        if op not in CHECKED:
            check_routed(name, trees, params, path.routed, path.native)
            CHECKED.add(op)
    return SoftmaxLoss(name, value_tree, grad_tree, params, path)


_BY_NLL = (("p", Tree("neg", (Tree("name", name="p"),))), ("q", Tree("name", name="p")))  # slopes of p and q


def _trees(value: str, grad: str | None, params: Mapping[str, float]) -> tuple[Tree, Tree, RowTrees]:
    """The expression and its slope by ce, and what is compiled: both times the weight of the class."""
    from ._derivative import derivative  # imports SymPy, which takes half a second

    tree = stable_in_row(parse(value, params, OF_ROW))
    if names(tree).isdisjoint(("ce", "nll", "p", "q", "lse")):
        raise ValueError(f"expected an expression of ce, nll, p, q or lse, got {value!r}")

    def slope(of: Tree, name: str, through: Any = ()) -> Tree:
        return stable_in_row(derivative(of, name, OF_ROW.names, through))

    if grad is None:
        unsmoothed = stable_in_row(renamed(tree, {"ce": "nll"}))
        by_ce = renamed(slope(unsmoothed, "nll", _BY_NLL), {"nll": "ce"})
    else:
        by_ce = stable_in_row(parse(grad, params, OF_ROW))
    trees = RowTrees(tree, by_ce, slope(tree, "ce"), slope(tree, "nll", _BY_NLL), slope(tree, "lse"))
    if "weight" not in names(tree):
        weight = Tree("name", name="weight")
        trees = RowTrees(*(each if each == number(0) else Tree("*", (weight, each)) for each in trees))
    return tree, by_ce, trees


def _formula(name: str, tree: Tree, parameters: tuple[str, ...]) -> _route.Formula:
    used = names(tree)

    def native(
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
        smoothing: Any = 0.0, *params: Any, wide: bool = False, second: bool = False, zero: bool = False,
    ) -> Any:  # fmt: skip
        x, target = in_float(logits), class_index(target)
        dim, limits = class_dim(x), torch.finfo(x.dtype)
        kept = target != ignore_index
        log_odds = torch.where(kept, log_odds_against(x, target, ignore_index, limits.min), 0.0)
        nll = -_torchs.logsigmoid(-log_odds)
        values: dict[str, Any] = {"nll": nll, "p": torch.sigmoid(-log_odds)}
        values["q"] = torch.sigmoid(log_odds).clamp_min(limits.tiny)  # a power of q has a finite slope
        smoothed = not isinstance(smoothing, NUMBERS) or smoothing != 0
        if smoothed or second or "lse" in used:
            values["lse"] = x.logsumexp(dim)
        values["ce"] = (1 - smoothing) * nll + smoothing * (values["lse"] - x.mean(dim)) if smoothed else nll
        of_class = 1.0 if weight is None else weight.to(x.dtype)[torch.where(kept, target, 0)]
        values["weight"] = of_class
        for parameter, value in zip(parameters, params, strict=True):
            values[parameter] = value if isinstance(value, NUMBERS) else checked(name, parameter, value)
        losses = torch.where(kept, evaluate(tree, values), 0.0)
        dtype = x.dtype if widened(logits, wide) else logits.dtype
        loss = reduced(losses, kept.sum(), reduction, zero).to(dtype)
        return (loss, torch.where(kept, values["lse"], 0.0).to(dtype)) if second else loss

    return native


def _path(op: str, source: str, name: str, formula: _route.Formula) -> Path:
    native = _route.over_rows(formula)
    address, why_native = library(op, source, name, of_rows)
    if address is not None:
        assert extension is not None
        if op not in extension.losses:  # where an interrupted definition has made it
            extension.add_softmax(op, address)
        return Path(native, _route.softmax(op, listed=False)(formula), "")

    def told(*arguments: Any, **options: Any) -> Any:
        _route.tell_native(why_native)
        return native(*arguments, **options)

    return Path(native, told, why_native)
