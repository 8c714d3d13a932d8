"""The route of a call: the kernels where they own it, the native formula everywhere else.

A loss is declared by its native formula in plain PyTorch::

    @pointwise("huber")
    def _huber(input, target, weight, reduction, delta=1.0): ...

which gives a callable of the same arguments that goes one of three ways:

1. eagerly, into the extension, which returns None for what it does not own;
2. into the dispatcher op ``torch.ops.fusedloss.huber`` while torch.compile or torch.export captures a graph;
3. into the formula itself for everything declined, and where the extension is missing.

The formula is also what the extension differentiates when a backward is itself differentiated.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _fake
from ._dtypes import HALVES
from ._library import extension, why_native

Formula = Callable[..., Tensor]


class Loss(NamedTuple):
    """A declared loss: the self-check and the tests run over all of them."""

    family: str
    routed: Formula
    native: Formula
    params: tuple[float, ...]  # the defaults of the formula's parameters
    soft: bool = False  # targets are class probabilities
    of_probabilities: bool = False  # inputs are


LOSSES: dict[str, Loss] = {}

if extension is not None:
    torch.library.register_fake("fusedloss::scale_", _fake.nothing)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_MEAN_OR_ZERO = 3  # kMeanOrZero of csrc/torch/common.h
_DTYPES = (torch.float32, torch.float64, *HALVES)
_PLAIN = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")
# What was built, not what runs on this GPU: to ask that would break the graph, and the op itself says so.
_DEVICES = ("cpu",) if extension is None or extension.cuda_architectures == "none" else ("cpu", "cuda")
_CUDA_MAX_CLASSES = 2**31 - 1 - 2**16  # kCudaMaxClasses of csrc/kernels.h


def pointwise(name: str, of_probabilities: bool = False, listed: bool = True) -> Callable[[Formula], Formula]:
    """Route ``formula(input, target, weight, reduction, *params)`` through the pointwise kernels of that name.

    A formula that takes ``pos_weight`` too has a factor of its positive term. ``of_probabilities``: inputs and targets
    lie in [0, 1]. ``listed``: the loss is one of :data:`LOSSES`.
    """
    traits = None if extension is None else getattr(extension, f"traits_of_{name}")
    captures = functools.partial(_captures_pointwise, traits)
    fakes = {} if traits is None else _fake.pointwise(traits.result)
    if not listed:
        return lambda formula: _fused(name, formula, captures, fakes, "pointwise")
    return lambda formula: _routed(name, formula, captures, fakes, "pointwise", of_probabilities=of_probabilities)


def indexed(name: str) -> Callable[[Formula], Formula]:
    """Route ``formula(logits, target, weight, reduction, ignore_index, *params)`` through the pointwise kernels of that
    name for class indices."""
    return lambda formula: _routed(f"{name}_indexed", formula, _captures_indexed, _fake.indexed, "indexed")


def softmax(name: str, soft: bool = False) -> Callable[[Formula], Formula]:
    """Route ``formula(logits, target, weight, reduction, ignore_index, *params, wide, second, zero)``.

    ``soft``: targets are class probabilities.

    The options: ``wide`` gives results in float32 for bfloat16 and float16, ``second`` a pair of the loss and the
    second result (the lse, of :func:`log_probs` the entropy), ``zero`` a mean over nothing that is 0. Beside them, the
    hints ``grad_in_forward`` and ``inplace`` say where a gradient may be made; only the kernels take them.
    """
    captures = _captures_probabilities if soft else _captures_indices
    fakes = {} if extension is None else _fake.softmax(getattr(extension, f"saved_by_{name}"))
    return lambda formula: _routed(name, formula, captures, fakes, "softmax", soft=soft)


class Path(Exception):
    """The path of a call in words: what a routed loss raises instead of taking it, while :func:`explain` asks."""


_asking: ContextVar[bool] = ContextVar("asking", default=False)


def explain(loss: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Which path a call takes, and why: ``loss(*arguments, **options)``, without computing it.

    Args:
        loss: a function of :mod:`fusedloss.functional` or a module of this package; its arguments follow.

    Returns:
        ``"fused: "`` with the device, the instruction set and the work, or ``"native: "`` with the reason.

    Raises:
        ValueError: the callable is no loss of this package.
        Whatever the call raises before it comes to a path.

    >>> explain(fusedloss.CrossEntropyLoss(), torch.zeros(2, 4), torch.tensor([0, 3]))  # doctest: +ELLIPSIS
    'fused: cpu ..., rows of 4'
    >>> explain(fusedloss.functional.sigmoid_focal_loss, torch.zeros(3, 1), torch.zeros(3))
    'native: an input and a target whose shapes do not fit'
    """
    token = _asking.set(True)
    try:
        loss(*arguments, **options)
    except Path as path:
        return str(path)
    finally:
        _asking.reset(token)
    raise ValueError(f"expected a loss of fusedloss, got {loss!r}")


def tell_native(reason: str) -> None:
    """For a public function that goes straight to plain PyTorch."""
    if not is_compiling() and _asking.get():
        raise Path(f"native: {reason}")


def _routed(
    name: str,
    formula: Formula,
    captures: Callable[..., bool],
    fakes: _fake.Fakes,
    family: str,
    **what: bool,
) -> Formula:
    routed = _unfused(formula) if extension is None else _fused(name, formula, captures, fakes, family)
    defaults = [
        parameter.default
        for parameter in inspect.signature(formula).parameters.values()
        if parameter.default is not parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    ]
    LOSSES[name] = Loss(family, routed, formula, tuple(defaults), **what)
    return routed


_HINTS = ("grad_in_forward", "inplace")


def _without_hints(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _HINTS}


def _unfused(formula: Formula) -> Formula:
    def loss(*arguments: Any, **options: Any) -> Any:
        if _asking.get():
            raise Path(f"native: {why_native}")
        return formula(*arguments, **_without_hints(options))

    return loss


def _fused(name: str, formula: Formula, captures: Callable[..., bool], fakes: _fake.Fakes, family: str) -> Formula:
    integers = 0 if family == "pointwise" else 1  # ignore_index
    runs: dict[str, Callable[..., Any]] = {
        "pointwise": functools.partial(_pointwise_op, getattr(extension, f"traits_of_{name}", None)),
        "softmax": _softmax_op,
        "indexed": _indexed_op,
    }
    run = runs[family]
    kernel: Any = getattr(extension, name)
    explained: Any = getattr(extension, f"explain_{name}")
    op: Any = getattr(torch.ops.fusedloss, name)
    getattr(extension, f"set_native_{name}")(formula)
    for suffix, fake in fakes.items():
        torch.library.register_fake(f"fusedloss::{name}{suffix}", fake)

    def loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *rest: Any, **options: Any) -> Any:
        if is_compiling():
            if captures(input, target, weight, reduction, **_without_hints(options)):
                params = [float(value) for value in rest[integers:]]
                call = (input, target, weight, REDUCTIONS[reduction], *rest[:integers], params)
                return run(op, *call, **_without_hints(options))
        else:
            if _asking.get():
                raise Path(explained(input, target, weight, reduction, *rest, **options))
            value = kernel(input, target, weight, reduction, *rest, **options)
            if value is not None:
                return value
        return formula(input, target, weight, reduction, *rest, **_without_hints(options))

    return loss


def _pointwise_op(
    traits: Any, op: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float],
    pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    wide = _result_dtype(traits, input, target, weight) != input.dtype
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    value: Tensor = op(input, target, weight, reduction, params, pos_weight, wide)
    return value


def _indexed_op(op: Any, *call: Any) -> Any:
    return op(*call)


def _softmax_op(
    op: Any, logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    params: list[float], wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    if zero and reduction == REDUCTIONS["mean"]:
        reduction = _MEAN_OR_ZERO
    # Under autocast, and beside probabilities of the wider dtype, a loss is float32 as torch's is.
    wide = wide or torch.is_autocast_enabled(logits.device.type)
    wide = wide or (target.is_floating_point() and target.dtype != logits.dtype)
    value, of_second, _ = op(
        logits, target, weight, reduction, ignore_index, params, wide and logits.dtype in HALVES, second
    )
    return (value, of_second) if second else value


# What a captured graph holds as a fused op. The extension cannot be asked: it would need real tensors.


def _captures(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> bool:
    plain = all(
        type(tensor).__name__ in _PLAIN and tensor.device == input.device and tensor.layout == torch.strided
        for tensor in (input, target, weight)
        if tensor is not None
    )
    return (
        plain
        and input.device.type in _DEVICES
        and reduction in REDUCTIONS
        and input.dtype in _DTYPES
        and input.numel() > 0
        and not (weight is not None and weight.requires_grad)
    )


def _captures_pointwise(
    traits: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, pos_weight: Tensor | None = None
) -> bool:
    """As declines_pointwise of csrc/torch/pointwise.cpp has it."""
    if not _captures(input, target, weight, reduction) or target.dtype not in _DTYPES:
        return False
    if input.device.type == "cuda" and not traits.on_cuda:
        return False
    if target.requires_grad and not (traits.of_difference or traits.has_target_slope):
        return False
    if input.shape != target.shape and not (traits.of_difference and _broadcasts_with(input.shape, target.shape)):
        return False
    for factor in (weight, pos_weight):
        if factor is None:
            continue
        if factor.requires_grad or factor.dtype not in _DTYPES or not _captures(input, target, factor, reduction):
            return False
        if not broadcasts_to(factor.shape, torch.broadcast_shapes(input.shape, target.shape)):
            return False
    return _result_dtype(traits, input, target, weight) is not None


def _result_dtype(traits: Any, input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype | None:
    """Of torch's result, where it is the input's or float32 beside a half-precision one."""
    half, result = input.dtype in HALVES, input.dtype
    others = [each for each in (target, weight) if each is not None]
    if half and torch.is_autocast_enabled(input.device.type):
        fits = target.dtype != torch.float64 and (input.device.type == "cpu" or not traits.of_probabilities)
        fits &= traits.result == "of target" or all(each.dtype != torch.float64 for each in others)
        return torch.float32 if fits else None
    if traits.result == "promoted":
        result = torch.promote_types(result, target.dtype)
        # A weight without dimensions gives way to losses that have some.
        if weight is not None and (weight.dim() or not (input.dim() or target.dim())):
            result = torch.promote_types(result, weight.dtype)
    elif traits.result == "of target":
        result = target.dtype
    elif traits.result == "same" and any(each.dtype != result for each in others):
        return None
    return result if result == input.dtype or (half and result == torch.float32) else None


# Compared one by one: `n in (1, m)` does not ask a size that the compiler keeps open.
def broadcasts_to(shape: torch.Size, full: torch.Size) -> bool:
    return len(shape) <= len(full) and all(n == 1 or n == m for n, m in zip(shape[::-1], full[::-1], strict=False))


def _broadcasts_with(shape: torch.Size, other: torch.Size) -> bool:
    return all(n == m or n == 1 or m == 1 for n, m in zip(shape[::-1], other[::-1], strict=False))


def _captures_indexed(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> bool:
    if not _captures(logits, target, weight, reduction) or logits.dim() < 2 or target.dtype != torch.int64:
        return False
    if torch.is_autocast_enabled(logits.device.type) or (weight is not None and weight.dtype != logits.dtype):
        return False
    if logits.device.type == "cuda" and logits.shape[1] > _CUDA_MAX_CLASSES:
        return False
    return target.shape == logits.shape[:1] + logits.shape[2:] and (
        weight is None or _of_rows_classes_or_elements(weight.shape, logits.shape)
    )


def _of_rows_classes_or_elements(weight: torch.Size, logits: torch.Size) -> bool:
    if len(weight) > len(logits):
        return False
    sizes = (1,) * (len(logits) - len(weight)) + tuple(weight)
    if any(size != 1 and size != full for size, full in zip(sizes, logits, strict=True)):
        return False
    of_rows, of_classes = sizes[1] == 1, all(size == 1 for d, size in enumerate(sizes) if d != 1)
    return of_rows or of_classes or sizes == tuple(logits)


def _captures_softmax(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, wide: bool) -> bool:
    if not _captures(logits, target, weight, reduction) or logits.dim() < 1:
        return False
    class_dim = min(logits.dim() - 1, 1)
    if logits.device.type == "cuda" and logits.shape[class_dim] > _CUDA_MAX_CLASSES:
        return False
    if weight is None:
        return True
    wide = wide or torch.is_autocast_enabled(logits.device.type)
    return (
        weight.shape == logits.shape[class_dim : class_dim + 1]
        and weight.dtype in (logits.dtype, _arithmetic(logits.dtype) if wide else logits.dtype)
    )  # fmt: skip


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _captures_indices(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, wide: bool = False, **options: bool
) -> bool:
    if not _captures_softmax(logits, target, weight, reduction, wide):
        return False
    class_dim = min(logits.dim() - 1, 1)
    rows = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    return target.dtype in (torch.int64, torch.uint8) and target.shape == rows


def _captures_probabilities(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, wide: bool = False, **options: bool
) -> bool:
    wide = wide or target.dtype != logits.dtype
    return (
        _captures_softmax(logits, target, weight, reduction, wide)
        and target.shape == logits.shape
        and target.dtype in (logits.dtype, _arithmetic(logits.dtype))
        and not target.requires_grad
    )
