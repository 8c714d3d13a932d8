"""What an op stands for in PyTorch's own operators: the native formula under the op's arguments.

``ExportedProgram.run_decompositions()`` and ``torch.onnx.export`` take it in the op's place; torch.compile keeps the
op.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._captures import REDUCTIONS
from ._fake import statistics, with_third
from ._library import extension
from ._traced import is_exporting

_NAMES = {number: name for name, number in REDUCTIONS.items()}


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class _Kernels(dict[Any, Any]):
    """The kernels in Python of an op that torch.compile keeps although it has a decomposition.

    Inductor, when it is first imported, takes every op with a composite kernel into a table, and then refuses to lower
    one that it meets in a graph. So it is told that there is none.
    """

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) and not (key == _COMPOSITE and _inductor_makes_its_table())


def _inductor_makes_its_table() -> bool:
    module = sys.modules.get("torch._inductor.decomposition")
    return module is not None and not hasattr(module, "decompositions")


def register(op: Any, decomposed: Callable[..., Any]) -> None:
    """Makes an op known to torch.export as one that has a decomposition.

    Both are kernels in Python, which only a tracer asks for. Because the op has kernels for its devices, torch would
    still keep it, so the kernel for autograd decomposes it. It keeps the op where the decomposition says
    NotImplemented: ours in any other tracing, and torch's in its place where the caller took the op out of the table.
    """
    composite = lambda *given, **options: decomposed(*given, **options) if _is_decomposing() else NotImplemented  # noqa: E731
    kernels = {_COMPOSITE: composite}
    for device in extension.devices:  # type: ignore[union-attr]
        kernels[getattr(torch._C.DispatchKey, f"Autograd{device.upper()}")] = _under_autograd(op)
    # Without those of a registration that was interrupted, which py_impl refuses to replace.
    op.py_kernels = _Kernels({key: kernel for key, kernel in op.py_kernels.items() if key not in kernels})
    for key, kernel in kernels.items():
        op.py_impl(key)(kernel)


def _under_autograd(op: Any) -> Callable[..., Any]:
    def kernel(*arguments: Any, **options: Any) -> Any:
        values = op.decompose(*arguments, **options)
        # Under this key the C++ side has registered its own, which serves every device.
        own = torch._C.DispatchKey.Autograd
        return op._op_dk(own, *arguments, **options) if values is NotImplemented else values

    return kernel


def _is_decomposing() -> bool:
    """Whether an exported program is being decomposed; torch.export itself and torch.compile keep the op."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return is_exporting() and mode is not None and not mode.pre_dispatch


def pointwise(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decomposed(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float],
        third: Tensor | None = None, wide: bool = False, ignore_index: int | None = None,
    ) -> Tensor:  # fmt: skip
        if wide:
            input = input.float()
            target = target.float() if target.is_floating_point() else target
            weight, third = (factor if factor is None else factor.float() for factor in (weight, third))
        options: dict[str, Any] = {} if third is None else {"third": third}
        if ignore_index is not None:
            options["ignore_index"] = ignore_index
        return formula(input, target, weight, _NAMES[reduction], *params, **options)

    return with_third(decomposed)


def row_sums(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def decomposed(
        first: Tensor, second: Tensor | None, third: Tensor | None, target: Tensor | None, weight: Tensor | None,
        reduction: int, params: list[float], wide: bool = False,
    ) -> Tensor:  # fmt: skip
        if wide:
            first = first.float()
            second, third, weight = (each if each is None else each.float() for each in (second, third, weight))
        return formula(first, second, third, target, weight, _NAMES[reduction], *params)

    return decomposed


def softmax(formula: Callable[..., Any], saved_by: Callable[[list[float]], int]) -> Callable[..., Any]:
    """The statistics, which only the op's own backward reads, are zeros."""

    def decomposed(
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, params: list[float],
        wide: bool = False, second: bool = False, sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        zero = reduction == extension.mean_or_zero  # type: ignore[union-attr]
        values = formula(
            logits, target, weight, "mean" if zero else _NAMES[reduction], ignore_index, *params,
            wide=wide, second=second, zero=zero, sample_weight=sample_weight,
        )  # fmt: skip
        value, of_second = values if second else (values, values.new_empty(0))
        numbers, arithmetic = statistics(logits, saved_by(params))
        return value, of_second, logits.new_zeros(numbers, dtype=arithmetic)

    return decomposed
