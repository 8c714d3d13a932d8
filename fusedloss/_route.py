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

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _fake
from ._library import extension

Formula = Callable[..., Tensor]


class Loss(NamedTuple):
    """A declared loss: the self-check and the tests run over all of them."""

    family: str
    routed: Formula
    native: Formula
    params: tuple[float, ...]  # the defaults of the formula's parameters


LOSSES: dict[str, Loss] = {}

if extension is not None:
    torch.library.register_fake("fusedloss::scale_", _fake.nothing)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")
# What was built, not what runs on this GPU: to ask that would break the graph, and the op itself says so.
_DEVICES = ("cpu",) if extension is None or extension.cuda_architectures == "none" else ("cpu", "cuda")
_CUDA_MAX_CLASSES = 2**31 - 1 - 2**16  # kCudaMaxClasses of csrc/kernels.h


def pointwise(name: str) -> Callable[[Formula], Formula]:
    """Route ``formula(input, target, weight, reduction, *params)`` through the pointwise kernels of that name."""
    return lambda formula: _routed(name, formula, _captures_pointwise, _fake.pointwise, "pointwise")


def indexed(name: str) -> Callable[[Formula], Formula]:
    """Route ``formula(logits, target, weight, reduction, ignore_index, *params)`` through the pointwise kernels of that
    name for class indices."""
    return lambda formula: _routed(f"{name}_indexed", formula, _captures_indexed, _fake.indexed, "indexed")


def softmax(name: str) -> Callable[[Formula], Formula]:
    """Route ``formula(logits, target, weight, reduction, ignore_index, *params)`` through the softmax kernels."""
    return lambda formula: _routed(name, formula, _captures_softmax, _fake.softmax, "softmax")


def _routed(name: str, formula: Formula, captures: Callable[..., bool], fakes: _fake.Fakes, family: str) -> Formula:
    integers = 0 if family == "pointwise" else 1  # ignore_index
    routed = _unfused(formula) if extension is None else _fused(name, formula, captures, fakes, integers)
    defaults = [parameter.default for parameter in inspect.signature(formula).parameters.values()]
    LOSSES[name] = Loss(family, routed, formula, tuple(d for d in defaults if d is not inspect.Parameter.empty))
    return routed


def _unfused(formula: Formula) -> Formula:
    def loss(*arguments: Any, **options: Any) -> Tensor:
        return formula(*arguments)

    return loss


def _fused(name: str, formula: Formula, captures: Callable[..., bool], fakes: _fake.Fakes, integers: int) -> Formula:
    kernel: Any = getattr(extension, name)
    op: Any = getattr(torch.ops.fusedloss, name)
    getattr(extension, f"set_native_{name}")(formula)
    for suffix, fake in fakes.items():
        torch.library.register_fake(f"fusedloss::{name}{suffix}", fake)

    # The options, such as inplace, say where a gradient may be made: a hint that only the kernels take.
    def loss(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *rest: Any, **options: Any
    ) -> Tensor:
        if is_compiling():
            if captures(input, target, weight, reduction):
                params = [float(value) for value in rest[integers:]]
                value = op(input, target, weight, REDUCTIONS[reduction], *rest[:integers], params)
                return value[0] if isinstance(value, tuple) else value
        else:
            value = kernel(input, target, weight, reduction, *rest, **options)
            if value is not None:
                return value
        return formula(input, target, weight, reduction, *rest)

    return loss


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
        and (weight is None or (weight.dtype == input.dtype and not weight.requires_grad))
        and not torch.is_autocast_enabled(input.device.type)
    )


def _captures_pointwise(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> bool:
    return (
        _captures(input, target, weight, reduction)
        and target.dtype == input.dtype
        and target.shape == input.shape
        and not target.requires_grad
        and (weight is None or weight.shape == input.shape)
    )


def _captures_indexed(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> bool:
    if not _captures(logits, target, weight, reduction) or logits.dim() < 2 or target.dtype != torch.int64:
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


def _captures_softmax(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> bool:
    if not _captures(logits, target, weight, reduction) or logits.dim() < 1 or target.dtype != torch.int64:
        return False
    class_dim = min(logits.dim() - 1, 1)
    if logits.device.type == "cuda" and logits.shape[class_dim] > _CUDA_MAX_CLASSES:
        return False
    return target.shape == logits.shape[:class_dim] + logits.shape[class_dim + 1 :] and (
        weight is None or weight.shape == logits.shape[class_dim : class_dim + 1]
    )
