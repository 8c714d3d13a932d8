"""The CPU kernels compiled for aarch64, whose vectors are NEON's, and run by an emulator: values and gradients."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compiler
import emulated
import plant
import pytest
import test_distillation_mutants as distillation
import test_mutants
import test_row_sums_mutants as row_sums
import torch
from compiler import CSRC, fingerprint
from emulated import DRIVERS, Emulated
from losses import LOSSES, SOFTMAX, Loss, extension, number
from marks import needs_extension, on_cpu_alone

COMPILER = os.environ.get("AARCH64_CXX", "aarch64-linux-gnu-g++")
EMULATOR = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), "")

pytestmark = [
    needs_extension,
    on_cpu_alone("another processor"),
    pytest.mark.deep("the kernels of another processor under an emulator; those of this one were compared", minutes=1),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and EMULATOR),
        reason=f"no {COMPILER} or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user); nothing else runs these",
    ),
]
NO_NOTES = "-Wno-psabi"  # as setup.py has it on this processor


def test_every_file_compiles_without_a_warning():
    sources = sorted((CSRC / "cpu").glob("*.cpp")) + sorted((CSRC / "cpu" / "isa").glob("*.cpp"))
    unit = "".join(f'#include "{source}"\n' for source in sources)
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", NO_NOTES, "-fsyntax-only", "-x", "c++", "-"]
    made = subprocess.run(command, input=unit, capture_output=True, text=True)
    assert made.returncode == 0 and made.stderr == "", made.stderr[:2000]


@pytest.fixture(scope="module")
def programs(once) -> Path:
    """One of each driver, with the flags of the build.

    Losses of row sums alone read and write half types: their kernels compile in a tenth of the others' time.
    """
    command = [COMPILER, "-std=c++20", *extension.compile_flags.split(), "-w", NO_NOTES]
    tools = [Path(tool.__file__ or "") for tool in (emulated, compiler, plant)]
    drivers = [
        emulated.HERE / "kernel_driver.h",
        *(emulated.HERE / f"{name}_driver.cpp" for name in (*DRIVERS, "emulated")),
    ]

    def make(folder: Path) -> None:
        without_halves = Path(shutil.copytree(CSRC, folder / "csrc", dirs_exist_ok=True))
        shutil.copy(CSRC / "kernels" / "functors.h", without_halves / "kernels")
        plant.leave_out_halves(without_halves)

        def build(driver: str) -> None:
            csrc = CSRC if driver == "row_sums" else without_halves
            subprocess.run(emulated.command(command, driver, folder / driver, csrc), check=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(build, DRIVERS))

    return once(f"aarch64-{fingerprint(' '.join(command), CSRC, *drivers, *tools)}", make)


def agrees_in_float(kernels: Emulated, loss: Loss) -> bool:
    x, target = loss.data((60, 50), torch.float32, seed=2)
    total, losses, grad, _ = test_mutants.run(kernels, loss, x, target)
    exact_x = x.double().requires_grad_()
    exact = loss.native(exact_x, target.double() if target.is_floating_point() else target, "none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
    pairs = [(torch.tensor(total), exact.sum()), (losses, exact), (grad, exact_grad)]
    return all(torch.allclose(made.double(), e, rtol=1e-5, atol=1e-6 * e.abs().max().item()) for made, e in pairs)


@pytest.mark.parametrize("op", sorted({loss.op for loss in LOSSES}))
def test_losses_of_elements_and_of_rows_agree_with_native(op, programs):
    family = "softmax" if any(loss.op == op for loss in SOFTMAX) else "pointwise"
    with Emulated(EMULATOR, programs / family, number(op)) as kernels:
        assert test_mutants.agrees_with_native(kernels, op)
        assert [loss.name for loss in LOSSES if loss.op == op and not agrees_in_float(kernels, loss)] == []


@pytest.mark.parametrize("kernel", row_sums.KERNELS)
def test_losses_of_row_sums_agree_with_native(kernel, programs):
    with Emulated(EMULATOR, programs / "row_sums") as kernels:
        assert row_sums.all_agree(kernels, kernel)


def test_divergences_agree_with_formulas(programs):
    with Emulated(EMULATOR, programs / "distillation") as kernels:
        assert distillation.agrees(kernels)
