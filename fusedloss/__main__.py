"""``python -m fusedloss``: what is installed, which path runs here, and every loss checked against native PyTorch.

``python -m fusedloss run script.py`` runs a script with its losses fused: see :mod:`.adoption`.
``python -m fusedloss bench --shape 4096,50257 --dtype bf16`` measures a loss beside torch's: see :mod:`._bench`.
"""

import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fusedloss

from ._bench import bench
from ._library import extension, why_native
from ._route import LOSSES, ROW_SUMS, Formula, Loss
from .adoption._script import run

# Relative to the largest value or gradient; a few rounding steps of each dtype. Natively, torch rounds as it adds up.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def sample(loss: Loss, class_indices: bool) -> tuple[Tensor, Tensor]:
    """An input in float64 and a target that fits; a seventh of the class indices is ignored."""
    torch.manual_seed(0)
    input = (4 * torch.randn(257, 33, dtype=torch.float64)).clamp(-8, 8)  # natively, e^12 is infinite in float16
    if loss.of_probabilities:
        input = (input / 4).sigmoid()
    if loss.positive:
        input = input.abs() + 0.1
    if loss.family == "row_sums":
        return input, torch.randint(33, (257,)) if loss.operands == 1 else 2 * torch.randint(2, (257,)) - 1
    if loss.family == "pointwise" and not class_indices:
        return input, torch.rand(257, 33, dtype=torch.float64).round()
    if loss.soft:
        return input, torch.randn(257, 33, dtype=torch.float64).softmax(1)
    index = torch.randint(33, (257,))
    index[::7] = -100
    return input, index


def value_and_grad(formula: Formula, loss: Loss, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = input.detach().requires_grad_()
    if loss.family == "row_sums":
        second, third = (input.roll(shift, 0) if shift < loss.operands else None for shift in (1, 2))
        value = formula(x, second, third, None if loss.operands == 3 else target, None, "mean", *loss.params)
    elif loss.family == "softmax":
        value = formula(x, target, None, "mean", -100, *loss.params)
    else:
        options = {} if target.is_floating_point() else {"ignore_index": -100}
        value = formula(x, target, None, "mean", *loss.params, **options)
    return value.detach(), torch.autograd.grad(value, x)[0]


def error(loss: Loss, dtype: torch.dtype, device: str, class_indices: bool = False) -> float:
    """The largest error of value and gradient, relative to the largest exact one."""
    input, target = sample(loss, class_indices)
    input, target = input.to(device, dtype), target.to(device)
    target = target.to(dtype) if target.is_floating_point() else target
    got = value_and_grad(loss.routed, loss, input, target)
    exact_target = target.double() if target.is_floating_point() else target
    exact = value_and_grad(loss.native, loss, input.double(), exact_target)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, exact, strict=True))


def rows() -> Iterator[tuple[str, Loss, bool]]:
    """Every loss, and once more over class indices where it takes them in place of its targets."""
    for name, loss in (LOSSES | ROW_SUMS).items():
        yield name, loss, False
        if loss.class_indices:
            yield f"{name}, class indices", loss, True


def dtypes(loss: Loss, device: str) -> list[torch.dtype]:
    """Those with digits to compare: in half precision torch refuses scores of classes on a CPU, and what it makes of
    cosines and distances has none left."""
    without_halves = loss.family == "row_sums" and (extension is None or (loss.operands == 1 and device == "cpu"))
    return [dtype for dtype in TOLERANCES if not (without_halves and dtype.itemsize == 2)]


def devices() -> list[str]:
    """The CPU, and a GPU where there is one and the kernels were built for it."""
    on_gpu = extension is not None and torch.cuda.is_available() and extension.has_kernels(torch.cuda.current_device())
    return ["cpu", "cuda"] if on_gpu else ["cpu"]


def main() -> int:
    print(f"fusedloss {fusedloss.__version__}, torch {torch.__version__}")
    if extension is None:
        print(f"path:  native PyTorch ({why_native})")
    else:
        print(f"built: {extension.compiler}, for torch {extension.torch_version}")
        print(f"       instruction sets {extension.cpu_isas}; CUDA architectures {extension.cuda_architectures}")
        threads = torch.get_num_threads()
        cuda = "" if extension.cuda_architectures == "none" else " and on CUDA"
        print(f"path:  fused on the CPU with {extension.cpu_isa()}, {threads} threads{cuda}; native elsewhere")
    failures = 0
    for device in devices():
        print(f"\nlargest relative error of value and gradient against native float64, {device}")
        print(" " * 49 + "".join(f"{str(dtype).removeprefix('torch.'):>10s}" for dtype in TOLERANCES))
        for name, loss, class_indices in rows():
            errors = {dtype: error(loss, dtype, device, class_indices) for dtype in dtypes(loss, device)}
            slack = 8 if extension is None else 1
            good = all(found <= slack * TOLERANCES[dtype] for dtype, found in errors.items())
            failures += not good
            cells = "".join(f"{errors[dtype]:10.1e}" if dtype in errors else f"{'-':>10s}" for dtype in TOLERANCES)
            print(f"  {name:47s}{cells}  {'ok' if good else 'OFF'}")
    return 1 if failures else 0


def check(arguments: list[str]) -> int:
    try:
        return main()
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at exit
        return 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {"check": check, "run": run, "bench": bench}

if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["check"]
    if command not in COMMANDS:
        sys.exit(f"expected {', '.join(COMMANDS)} or nothing, got {command}")
    sys.exit(COMMANDS[command](rest))
