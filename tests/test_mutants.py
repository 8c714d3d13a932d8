"""A test of the tests: with one thing wrong in a formula or a driver, the comparison with native must fail.

Each mutant is the kernels' source with one edit, compiled on its own (a few seconds) and driven without torch.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import LOSSES, SOFTMAX, Loss, needs_extension
from torch import Tensor

from fusedloss._library import extension

pytestmark = needs_extension

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")
NAMES = (extension.pointwise_losses, extension.softmax_losses) if extension else ()
INDEX = {name: index for names in NAMES for index, name in enumerate(names)}

# name: (file, what stands there, what is put in its place)
MUTANTS = {
    "huber value": ("losses/pointwise.h", "T(0.5) * z * z", "T(0.25) * z * z"),
    "huber slope below": ("losses/pointwise.h", "z < -delta ? -delta : z", "z < -delta ? delta : z"),
    "sigmoid focal gamma": ("losses/pointwise.h", "modulation.gamma * (T(1)", "T(2) * (T(1)"),
    "sigmoid focal alpha": ("losses/pointwise.h", "T(2 * alpha - 1)", "T(1 - 2 * alpha)"),
    "sigmoid focal certain": ("losses/pointwise.h", "s.p * (T(1) - t) - s.q * t", "s.p - t"),
    "softmax q by subtraction": ("losses/softmax.h", "rest * inverse, max", "T(1) - own * inverse, max"),
    "softmax log without 1p": ("losses/softmax.h", "log1p(excess)", "log(T(1) + excess)"),
    "focal ratio": ("losses/softmax.h", "T(1) + gamma * ratio", "T(1) + gamma"),
    "target left in": ("cpu/softmax.inl", "if (hole >= 0) to[hole] = -infinity<T>();", ""),
    "block rescale": ("cpu/softmax.inl", "if (block > 0) rest *= double(exp(max - block_max));", ""),
    "column rescale": ("cpu/softmax.inl", "tile.rest[j] * e + T(1)", "tile.rest[j] + T(1)"),
    "tail of a sum": (
        "cpu/pointwise.inl",
        "for (int lane = 0; i + lane < stop; ++lane) lanes[lane] += at(i + lane);",
        "",
    ),
}


def build(folder: Path, edit: tuple[str, str, str] | None) -> ctypes.CDLL:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    if edit is not None:
        name, old, new = edit
        path = folder / "csrc" / name
        source = path.read_text()
        assert source.count(old) == 1, f"expected {old!r} once in {name}, found it {source.count(old)} times"
        path.write_text(source.replace(old, new))
    library = folder / "kernels.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
    subprocess.run(
        [COMPILER, *flags, f"-I{folder / 'csrc'}", str(ROOT / "tests" / "kernel_driver.cpp"), "-o", str(library)],
        check=True,
    )
    kernels = ctypes.CDLL(str(library))
    kernels.run_pointwise.restype = kernels.run_softmax.restype = kernels.run_indexed.restype = ctypes.c_double
    return kernels


def run(kernels: ctypes.CDLL, loss: Loss, x: Tensor, target: Tensor) -> tuple[float, Tensor, Tensor]:
    """Sum of the losses, the losses and the gradient of their sum."""
    pointer = lambda tensor: ctypes.c_void_p(tensor.data_ptr())  # noqa: E731
    params = (ctypes.c_double * 2)(*(loss.params + (0.0, 0.0))[:2])
    losses, grad = torch.empty(target.shape, dtype=x.dtype), torch.empty_like(x)
    head = (INDEX[loss.op], int(x.dtype == torch.float64))
    if loss in SOFTMAX:
        statistics = torch.empty(2 * len(x), dtype=x.dtype)
        total = kernels.run_softmax(
            *head, ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), pointer(x), pointer(target), params,
            pointer(statistics), pointer(losses), pointer(grad),
        )  # fmt: skip
    else:
        total = kernels.run_pointwise(
            *head, ctypes.c_int64(x.numel()), pointer(x), pointer(target), params, pointer(losses), pointer(grad)
        )
    return total, losses, grad


def agrees_with_native(kernels: ctypes.CDLL) -> bool:
    for loss in LOSSES:
        native = LOSSES[1].native if loss.op == "cross_entropy" else loss.native  # see test_values: digits
        for shape in [(40, 7), (5, 200), (2, 9000)] if loss in SOFTMAX else [(5000,), (77,)]:
            x, target = loss.data(shape, torch.float64, seed=1)
            if loss in SOFTMAX:
                x[0, target[0]] += 60  # a confident row
            else:
                x[:20] *= 12  # confident elements
            exact_x = x.clone().requires_grad_()
            exact = native(exact_x, target, "none")
            (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
            total, losses, grad = run(kernels, loss, x, target)
            close = [
                torch.allclose(torch.tensor(total, dtype=torch.float64), exact.detach().sum(), rtol=1e-12, atol=0),
                torch.allclose(losses, exact.detach(), rtol=1e-12, atol=1e-300),
                torch.allclose(grad, exact_grad, rtol=1e-10, atol=1e-300),
            ]
            if not all(close):
                return False
    return True


needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason="no C++ compiler; tests/test_values.py covers the formulas as they are"
)


@needs_compiler
def test_the_kernels_as_they_are_agree(tmp_path):
    assert agrees_with_native(build(tmp_path, None))


@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, tmp_path):
    assert not agrees_with_native(build(tmp_path, MUTANTS[mutant]))
