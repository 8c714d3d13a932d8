"""The route of a call: the kernels where they own it, the native formula everywhere else.

A loss is declared by its native formula in plain PyTorch::

    @pointwise("huber")
    def _huber(input, target, weight, reduction, delta=1.0): ...

which gives a callable of the same arguments that goes one of three ways:

1. eagerly, into the extension, which returns None for what it does not own;
2. into the dispatcher op ``torch.ops.fusedloss.huber`` while torch.compile or torch.export captures a graph;
3. into the formula itself for everything declined, for what torch.compile does as well without an op, and where the
   extension is missing.

The formula is also what the extension differentiates when a backward is itself differentiated, where it knows no second
derivative in closed form.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, compiler
from torch.compiler import is_compiling, is_dynamo_compiling, set_stance
from torch.overrides import handle_torch_function

from . import _captures, _decomposed, _fake
from ._captures import REDUCTIONS as REDUCTIONS
from ._dtypes import HALVES
from ._library import extension, why_native
from ._one_hot import over_class_indices
from ._sizes import broadcasts_to as broadcasts_to
from ._sizes import same_shape
from ._traced import asked_once, is_exporting
from ._weighted import over_weighted_rows
from .losses._dtensors import is_dtensor, over_whole_classes, refused_softmax, served_pointwise

Formula = Callable[..., Tensor]


class Loss(NamedTuple):
    """A declared loss: the self-check and the tests run over all of them."""

    family: str
    routed: Formula
    native: Formula
    params: tuple[float, ...]  # the defaults of the formula's parameters
    soft: bool = False  # targets are class probabilities
    of_probabilities: bool = False  # inputs are
    class_indices: bool = False  # targets may be class indices, beside an ignore_index
    positive: bool = False  # inputs are
    operands: int = 1  # of a loss of row sums: one beside class indices, two beside labels, or three alone


LOSSES: dict[str, Loss] = {}
ROW_SUMS: dict[str, Loss] = {}  # those of row sums, which take other arguments

if extension is not None:
    torch.library.register_fake("fusedloss::scale_", _fake.nothing)


def pointwise(
    name: str,
    left: str = "",
    of_probabilities: bool = False,
    class_indices: bool = False,
    positive: bool = False,
    listed: bool = True,
) -> Callable[[Formula], Formula]:
    """Route ``formula(input, target, weight, reduction, *params)`` through the pointwise kernels of that name.

    A formula may take a ``third`` operand too, such as a variance: None counts as 1. ``left``: when it is
    :func:`left to a compiler <fusedloss._captures.left_to_compiler>`. ``of_probabilities``: inputs and targets lie in
    [0, 1]. ``class_indices``: beside an ``ignore_index`` the routed loss takes class indices for targets.
    ``positive``: inputs are. ``listed``: the loss is one of :data:`LOSSES`.
    """

    def route(formula: Formula) -> Formula:
        native = over_class_indices(formula) if class_indices else formula
        routed = _unfused(native, _POINTWISE) if extension is None else _fused(name, native, left, _POINTWISE)
        if listed:
            params = _defaults(formula)
            LOSSES[name] = Loss("pointwise", routed, native, params, False, of_probabilities, class_indices, positive)
        return routed

    return route


def softmax(
    name: str, left: str = "", soft: bool = False, mean_by_weight: bool = False, listed: bool = True
) -> Callable[[Formula], Formula]:
    """Route ``formula(logits, target, weight, reduction, ignore_index, *params, wide, second, zero)``.

    ``left``: as for :func:`pointwise`. ``soft``: targets are class probabilities. ``mean_by_weight``: the mean divides
    by the sum of the targets' weights. ``listed``: the loss is one of :data:`LOSSES`. The routed loss takes a
    ``sample_weight`` of the rows beside the formula's options, as :mod:`._weighted` states it.

    The options: ``wide`` gives results in float32 for bfloat16 and float16, ``second`` a pair of the loss and the
    second result (the lse, of :func:`log_probs` the entropy), ``zero`` a mean over nothing that is 0. Beside them, the
    hints ``grad_in_forward`` and ``inplace`` say where a gradient may be made; only the kernels take them.
    """

    def route(formula: Formula) -> Formula:
        native = over_rows(formula, soft, mean_by_weight)
        routed = _unfused(native, _SOFTMAX) if extension is None else _fused(name, native, left, _SOFTMAX)
        if listed:
            LOSSES[name] = Loss("softmax", routed, native, _defaults(formula), soft=soft)
        return routed

    return route


def over_rows(formula: Formula, soft: bool = False, mean_by_weight: bool = False) -> Formula:
    """What the native formula of a softmax loss becomes: of weighted rows, and of DTensors."""
    return over_whole_classes(over_weighted_rows(formula, soft, mean_by_weight))


def row_sums(name: str, operands: int, left: str = "") -> Callable[[Formula], Formula]:
    """Route ``formula(first, second, third, target, weight, reduction, *params)`` through the kernels of row sums.

    What the loss does not take is None: of three ``operands``, a target, and class weights. ``left``: as for
    :func:`pointwise`.
    """

    def route(formula: Formula) -> Formula:
        routed = _unfused(formula, _ROW_SUMS) if extension is None else _fused(name, formula, left, _ROW_SUMS)
        ROW_SUMS[name] = Loss("row_sums", routed, formula, _defaults(formula), operands=operands)
        return routed

    return route


class Path(Exception):
    """The path of a call in words: what a routed loss raises instead of taking it, while :func:`explain` asks."""


_asking: ContextVar[str] = ContextVar("asking", default="")  # about a call that is eager, or compiled


def explain(loss: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Which path a call takes, and why: ``loss(*arguments, **options)``, without computing it.

    Args:
        loss: a function of :mod:`fusedloss.functional` or a module of this package; its arguments follow. Or what
            torch.compile makes of one.

    Returns:
        ``"fused: "`` with the device, the instruction set and the work, or ``"native: "`` with the reason.

    Raises:
        ValueError: it is no loss of this package, or a class of one and not a module.
        Exception: whatever the call raises before it comes to a path.

    >>> import fusedloss
    >>> explain(fusedloss.CrossEntropyLoss(), torch.zeros(2, 4), torch.tensor([0, 3]))  # doctest: +ELLIPSIS
    'fused: cpu ..., rows of 4'
    >>> explain(fusedloss.functional.sigmoid_focal_loss, torch.zeros(3, 1), torch.zeros(3))
    'native: an input and a target whose shapes do not fit'
    >>> explain(torch.compile(fusedloss.MSELoss()), torch.zeros(3), torch.ones(3))
    'native: a formula that torch.compile fuses into its neighbours'
    """
    if isinstance(loss, type) or not callable(loss):
        raise ValueError(f"expected a loss of fusedloss, a module or a function, got {loss!r}")
    compiled = _is_compiled(loss)
    before = _asking.get()
    try:  # where an interrupt between the two lines would leave every later loss asked
        _asking.set("compiled" if compiled else "eager")
        with set_stance("force_eager") if compiled else nullcontext():
            loss(*arguments, **options)
    except Path as path:
        return str(path)
    finally:
        _asking.set(before)
    raise ValueError(f"expected a loss of fusedloss, got {loss!r}")


def _is_compiled(loss: Any) -> bool:
    """Whether torch.compile made it: of a function, of a module, or in place."""
    return any(
        getattr(loss, name, None) is not None
        for name in ("_torchdynamo_orig_callable", "_orig_mod", "_compiled_call_impl")
    )


def asked() -> bool:
    """Whether :func:`explain` asks, and not for the result."""
    return bool(_asking.get())


def tell(path: str) -> None:
    """For a public function that knows its path without one of the ops above."""
    if not is_compiling() and _asking.get():
        raise Path(path)


def tell_native(reason: str) -> None:
    """For a public function that goes straight to plain PyTorch."""
    tell(f"native: {reason}")
    if not is_compiling() and heard_native:
        _hear(lambda: reason)


# Called with a function that says why, whenever an eager call runs natively.
heard_native: list[Callable[[Callable[[], str]], None]] = []


def _hear(why: Callable[[], str]) -> None:
    for listener in heard_native:
        listener(why)


def overrides_apply() -> bool:
    """Whether a ``__torch_function__`` that was found may be called: torch.compile finds disabled ones too."""
    return not is_compiling() or torch._C._is_torch_function_enabled()


def overridden(function: Callable[..., Any], relevant: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """torch's handle_torch_function without the arguments left out: None's type has no override to look for, which
    torch.compile of torch 2.11 does not know."""
    given = tuple(each for each in relevant if each is not None)
    return handle_torch_function(function, given, *args, **kwargs)


def _defaults(formula: Formula) -> tuple[float, ...]:
    return tuple(
        parameter.default
        for parameter in inspect.signature(formula).parameters.values()
        if parameter.default is not parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    )


def _without_hints(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("grad_in_forward", "inplace")}


def _unfused(formula: Formula, family: "_Family") -> Formula:
    def loss(*call: Any, **options: Any) -> Any:
        tell_native(why_native)
        placed = family.placed(loss, formula, *call, **options)
        return formula(*call, **_without_hints(options)) if placed is None else placed

    return loss


class _Family(NamedTuple):
    """What the ops of a family need in Python."""

    # capture(op, known, left)(*arguments, **options) puts an op into a graph, or returns None
    capture: Callable[[Any, Any, str], Callable[..., Any]]
    fakes: Callable[[Any], _fake.Fakes]  # of a loss as the extension knows it
    decomposed: Callable[[Formula, Any], Callable[..., Any]]
    # placed(loss, formula, *arguments, **options): the loss of DTensors by their shards, or None; or it refuses them
    placed: Callable[..., Any]
    # The numbers of a call, of which those behind the first two are ours alone.
    rest: Callable[[tuple[Any, ...]], Sequence[Any]] = lambda call: call[4:]


def _fused(name: str, formula: Formula, left: str, family: _Family) -> Formula:
    known = extension.losses[name]  # type: ignore[union-attr]
    known.native = formula
    kernel, explained = known.run, known.explain
    op = getattr(torch.ops.fusedloss, name)
    for suffix, fake in family.fakes(known).items():
        torch.library.register_fake(f"fusedloss::{name}{suffix}", fake)
    _decomposed.register(op.default, family.decomposed(formula, known))
    capture = family.capture(op, known, left)

    def loss(*call: Any, **options: Any) -> Any:  # named arguments would take half as long as a small loss
        if is_dynamo_compiling() or compiler._is_compiling_flag:  # is_compiling, which asks TorchScript too
            value = capture(*call, **options)
        elif (asking := _asking.get()) and not is_dtensor(call[0]):
            path = explained(*call, **options)
            reason = asking == "compiled" and _captures.left_to_compiler(left, call[0], family.rest(call), options)
            raise Path(f"native: {reason}" if reason and not path.startswith("native") else path)
        else:
            value = kernel(*call, **options)
        if value is not None:
            return value
        placed = family.placed(loss, formula, *call, **options)
        if placed is not None:
            return placed
        if not is_compiling():
            if asked():  # about a DTensor
                tell(explained(*call, **options))
            if heard_native:
                _hear(lambda: explained(*call, **options).removeprefix("native: "))
        return formula(*call, **_without_hints(options))

    return loss


def _sums_its_gradient(operand: Tensor) -> bool:
    """Whether the op broadcasts an operand, so that the gradient is summed before it is rounded to a half type."""
    return operand.dtype in HALVES and operand.requires_grad and torch.is_grad_enabled()


def _capture_pointwise(op: Any, known: Any, left: str) -> Callable[..., Any]:
    traits = known.traits

    def owned(
        input: Any, target: Any, weight: Any, reduction: str, third: Any, ignore_index: Any, exports: bool,
        *params: Any,
    ) -> tuple[int, bool, bool] | None:  # fmt: skip
        """The reduction and ``wide`` of the op, and whether the operands are of one shape; or None."""
        if not exports and _captures.left_to_compiler(left, input, (), {"ignore_index": ignore_index}):
            return None
        if _captures.pointwise(traits, input, target, weight, reduction, params, third, ignore_index) is not None:
            return None
        if ignore_index is not None:
            return REDUCTIONS[reduction], False, True
        wide = _captures.result_dtype(traits, input, target, weight, third) != input.dtype
        sizes = [target.shape, *([third.shape] if third is not None and traits.has_third_slope else [])]
        return REDUCTIONS[reduction], wide, all(same_shape(input.shape, each) for each in sizes)

    ask = asked_once(owned)

    def capture(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *params: Any,
        third: Tensor | None = None, ignore_index: int | None = None,
    ) -> Any:  # fmt: skip
        call = (input, target, weight, reduction, third, ignore_index, is_exporting())
        found, params = ask(call, params)
        if found is None:
            return None
        kind, wide, one_shape = found
        if not one_shape:
            others = () if third is None else (third,)  # which the op broadcasts itself
            input, target = (
                given if _sums_its_gradient(given) else read
                for given, read in zip((input, target), torch.broadcast_tensors(input, target, *others), strict=False)
            )
        if ignore_index is None and not target.is_floating_point():
            target = target.to(torch.float32 if wide else input.dtype)
        return op(input, target, weight, kind, [float(each) for each in params], third, wide, ignore_index)

    return capture


def _capture_softmax(op: Any, known: Any, left: str) -> Callable[..., Any]:
    traits = known.traits

    def owned(
        logits: Any, target: Any, weight: Any, reduction: str, ignore_index: Any, wide: bool, second: bool, zero: bool,
        sample_weight: Any, exports: bool, *params: Any,
    ) -> tuple[int, bool] | None:  # fmt: skip
        """The reduction and ``wide`` of the op, or None."""
        ours = {"wide": wide, "second": second, "zero": zero, "sample_weight": sample_weight}
        if not exports and _captures.left_to_compiler(left, logits, (ignore_index, *params), ours):
            return None
        call = (logits, target, weight, reduction, ignore_index, params, wide, second, sample_weight)
        if _captures.softmax(traits, *call) is not None:
            return None
        kind = extension.mean_or_zero if zero and reduction == "mean" else REDUCTIONS[reduction]  # type: ignore[union-attr]
        return kind, _captures.is_wide(traits, logits, target, wide)

    ask = asked_once(owned)

    def capture(
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, *params: Any,
        wide: bool = False, second: bool = False, zero: bool = False, sample_weight: Tensor | None = None,
        grad_in_forward: bool | None = None, inplace: bool = False,
    ) -> Any:  # fmt: skip
        options = (wide, second, zero, sample_weight, is_exporting())
        call = (logits, target, weight, reduction, ignore_index, *options)
        found, params = ask(call, params)
        if found is None:
            return None
        kind, wide = found
        numbers = [float(each) for each in params]
        value, of_second, _ = op(logits, target, weight, kind, ignore_index, numbers, wide, second, sample_weight)
        return (value, of_second) if second else value

    return capture


def _capture_row_sums(op: Any, known: Any, left: str) -> Callable[..., Any]:
    traits = known.traits

    def owned(
        first: Any, second: Any, third: Any, target: Any, weight: Any, reduction: str, exports: bool, *params: Any
    ) -> tuple[int, bool] | None:
        """The reduction and ``wide`` of the op, or None."""
        if not exports and _captures.left_to_compiler(left, first, (), {}):
            return None
        if _captures.row_sums(traits, first, second, third, target, weight, reduction, params) is not None:
            return None
        return REDUCTIONS[reduction], _captures.widens(first)

    ask = asked_once(owned)

    def capture(
        first: Tensor, second: Tensor | None, third: Tensor | None, target: Tensor | None, weight: Tensor | None,
        reduction: str, *params: Any,
    ) -> Any:  # fmt: skip
        found, params = ask((first, second, third, target, weight, reduction, is_exporting()), params)
        if found is None:
            return None
        kind, wide = found
        return op(first, second, third, target, weight, kind, [float(each) for each in params], wide)

    return capture


_POINTWISE = _Family(
    _capture_pointwise,
    lambda known: _fake.pointwise(known.traits),
    lambda formula, known: _decomposed.pointwise(formula),
    served_pointwise,
)
_SOFTMAX = _Family(
    _capture_softmax,
    lambda known: _fake.softmax(known.saved_by),
    lambda formula, known: _decomposed.softmax(formula, known.saved_by),
    refused_softmax,
)
_ROW_SUMS = _Family(
    _capture_row_sums,
    lambda known: _fake.row_sums(),
    lambda formula, known: _decomposed.row_sums(formula),
    lambda *call, **options: None,  # torch's operators take DTensors one by one
    rest=lambda call: (),
)
