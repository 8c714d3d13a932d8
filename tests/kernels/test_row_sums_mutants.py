"""A test of the tests, as test_mutants.py, for the losses of whole rows and the driver of their kernels on a CPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compiler import COMPILER, CSRC
from emulated import Kernels, pointer, pointers
from losses import DTYPES, number
from marks import needs_compiler, needs_extension
from plant import planted
from test_row_sums_cuda import KERNELS, Call

from fusedloss import _torchs_slopes

pytestmark = [
    needs_extension,
    needs_compiler,
    pytest.mark.deep("mutants of the formulas and the driver, which must fail; the kernels as they are were compared"),
]

FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
FLAGS += _torchs_slopes.flags()
FORMULAS, DRIVER = "losses/row_sums.h", "cpu/row_sums.inl"
# The kernel that goes wrong: {name: (file, what stands there, what is put in its place)}
MUTANTS = {
    "cosine": {
        "cosine value": (FORMULAS, "return T(1) - cos;", "return -cos;"),
        "cosine margin": (FORMULAS, "above = cos - margin", "above = cos"),
        "cosine slope": (FORMULAS, "c[1] = -slope * of.cos / of.first;", "c[1] = -slope / of.first;"),
        "slope below the margin": (FORMULAS, "&& on_slope(of.cos - margin)", ""),
        "a label that is neither": (FORMULAS, "row.label == T(-1)) return above", "row.label != T(1)) return above"),
        "tail of a row": (DRIVER, "for (int lane = 0; i + lane < end; ++lane) add(i + lane, lane);", ""),
        "blocks of a row": (DRIVER, "if (args.columns > kRowBlock) block.read(begin, count);", ""),
        "the stride of rows": (DRIVER, "row_ * args_.row_strides[k] + begin", "row_ * args_.columns + begin"),
        "upstream gradient": (DRIVER, "i * args.upstream_stride", "0"),
    },
    "triplet": {
        "eps": (FORMULAS, "terms[0] = term(x[0] - x[1] + eps);", "terms[0] = term(x[0] - x[1]);"),
        "triplet margin": (FORMULAS, "return margin + distance(sums_[0])", "return distance(sums_[0])"),
        "an inactive triplet": (FORMULAS, "on_slope(missing(sums_)) ? upstream : T(0)", "upstream"),
        "the negative's gradient": (FORMULAS, "grads[2] = -negative;", "grads[2] = negative;"),
        "the other norm": (
            FORMULAS,
            "return kSquared ? difference * difference",
            "return !kSquared ? difference * difference",
        ),
    },
    "triplet, swap": {
        "never swapped": (FORMULAS, "if (!(negative <= swapped))", "if (negative != negative)"),
        "swapped gradient": (FORMULAS, "grads[2] -= swapped;", ""),
        "both slopes": (FORMULAS, "c[1] = by_distance(negative > swapped ? T(0) : -given", "c[1] = by_distance(-given"),
    },
    "triplet, norm 1": {
        "sign": (FORMULAS, "- select(difference < T(0), T(1), T(0))", ""),
    },
    "margins": {
        "hinge": (FORMULAS, "return select(z > T(0), z, T(0));", "return z;"),
        "target's gradient": (FORMULAS, "return -c[0] * sums[1];", "return c[0] * sums[1];"),
        "weight": (FORMULAS, "c[0] = upstream * row.weight;", "c[0] = upstream;"),
        "the target's column added": (
            DRIVER,
            "add_terms<T>(loss, facts, block.x, skipped + 1, count, total);",
            "add_terms<T>(loss, facts, block.x, skipped, count, total);",
        ),
    },
    "margins, squared": {
        "squared slope": (FORMULAS, "return T(2) * hinge(x, row);", "return hinge(x, row);"),
        "square": (FORMULAS, "terms[0] = kSquared ? z * z : z;", "terms[0] = z;"),
    },
}


def build(folder: Path, edit: tuple[str, str, str] | None) -> ctypes.CDLL:
    source = planted(folder, *edit) if edit else Path(shutil.copytree(CSRC, folder / "csrc"))
    library, driver = folder / "kernels.so", Path(__file__).with_name("row_sums_driver.cpp")
    command = [*COMPILER.split(), *FLAGS, "-shared", f"-I{source}", str(driver), "-o", str(library)]
    subprocess.run(command, check=True)
    kernels = ctypes.CDLL(str(library))
    kernels.run_row_sums.restype = ctypes.c_double
    return kernels


def agrees(kernels: Kernels, kernel: str, dtype: torch.dtype, rows: int, columns: int, apart: int) -> bool:
    call = Call(kernel, dtype, rows, columns)
    losses, grads = call.exact(call.upstream)
    name, params, operands, target, weight = call.given()
    stored = [torch.cat([each, each[:, :apart]], 1) for each in operands]
    made = [torch.full_like(each, 77.0) for each in operands]
    each = torch.full((rows,), 77.0, dtype=dtype)
    total = kernels.run_row_sums(
        number(name), DTYPES.index(dtype), ctypes.c_int64(rows), ctypes.c_int64(columns),
        ctypes.c_int64(stored[0].stride(0)), pointers(stored), pointer(target), pointer(weight),
        (ctypes.c_double * 8)(*params), pointer(call.upstream), pointer(each), pointers(made),
    )  # fmt: skip
    eps = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    pairs = [(torch.tensor(total, dtype=torch.float64), losses.sum()), (each, losses), *zip(made, grads, strict=True)]
    return all(
        torch.allclose(got.double(), exact, rtol=eps, atol=eps * max(1.0, exact.abs().max().item()))
        for got, exact in pairs
    )


def all_agree(kernels: Kernels, kernel: str) -> bool:
    """Rows of a tail alone, of lanes, of lanes and a tail, and of several blocks; rows apart; every way to read."""
    sizes = [(9, 7, 0), (12, 64, 3), (12, 45, 0), (5, 1100, 1)]
    return all(agrees(kernels, kernel, torch.float64, *size) for size in sizes) and all(
        agrees(kernels, kernel, dtype, *size) for dtype in DTYPES for size in sizes[2:]
    )


def test_the_kernels_as_they_are_agree(tmp_path):
    kernels = build(tmp_path, None)
    assert [kernel for kernel in KERNELS if not all_agree(kernels, kernel)] == []


@pytest.mark.parametrize(
    ("kernel", "mutant"), [(kernel, mutant) for kernel, some in MUTANTS.items() for mutant in some]
)
def test_a_mutant_is_caught(kernel, mutant, tmp_path):
    assert not all_agree(build(tmp_path, MUTANTS[kernel][mutant]), kernel)
