"""The compiled extension: csrc/torch/module.cpp."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

class Loss:
    """A loss as the kernels know it."""

    name: str
    family: str  # "pointwise", "softmax" or "row_sums"
    number: int  # in its family
    run: Callable[..., Any]
    """Computes the loss of ``(input, target, weight, reduction, [ignore_index,] *params, **options)``, or returns None
    where the kernels do not own the call."""
    explain: Callable[..., str]
    """The path of a call of the same arguments, in words: "fused: cpu avx512, rows of 10" or "native: " and why."""
    traits: SimpleNamespace  # what a loss is whatever its parameters
    saved_by: Callable[[list[float]], int]  # softmax losses: the numbers a row leaves to backward
    native: Callable[..., Any] | None  # the formula that a differentiated backward differentiates

losses: dict[str, Loss]
distillation: SimpleNamespace
"""``run`` and ``explain`` of ``(student, teacher, labels, weight, direction, teacher_is, reduction, ignore_index,
temperature, beta, return_lse)``, as those of a loss, and ``set_native``, which takes the formula of the same and of
whether results are wide."""
devices: dict[str, SimpleNamespace]
mean_or_zero: int  # the reduction to a mean that is 0 over nothing
most_params: int  # of a loss
cpu_isas: str
compiler: str
compile_flags: str
torch_version: str
cuda_architectures: str

def add_pointwise(name: str, custom: int) -> None: ...
def add_softmax(name: str, custom: int) -> None: ...
def cpu_isa() -> str: ...
def check() -> None: ...
def has_kernels(device: int) -> bool: ...
