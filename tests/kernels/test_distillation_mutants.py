"""A test of the tests: with one thing wrong in the divergences of rows, the comparison with formulas must fail."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compiler import COMPILER, CSRC
from distillation_calls import DIRECTIONS, TEACHERS, pair, rows
from emulated import Kernels, pointer
from marks import needs_compiler
from plant import keep_one_type, planted
from torch import Tensor

pytestmark = [
    needs_compiler,
    pytest.mark.deep("mutants of the divergences, which must fail; the kernels as they are were compared"),
]

FORMULAS, DRIVER, ARGUMENTS = "losses/distillation.h", "cpu/distillation.inl", "kernels/distillation.h"
# {name: (file, what stands there, what is put in its place)}
MUTANTS = {
    "a mass that is not 1": (FORMULAS, "return constant * c.q - c.p;", "return c.q - c.p;"),
    "forward, raised": (FORMULAS, "row.sum_p, gap_p - gap_q, shrunk_p", "row.sum_p, gap_p, shrunk_p"),
    "reverse, raised": (FORMULAS, "row.sum_q, gap_q - gap_p, shrunk_q", "row.sum_q, gap_q, shrunk_q"),
    "reverse, slope": (FORMULAS, "c.log_q - c.log_p - constant", "c.log_q - c.log_p"),
    "the larger side's share": (FORMULAS, "select(q_is_larger, of_teacher, of_student)", "of_student"),
    "jsd, slope": (FORMULAS, "logs(c).q_over_m - constant", "logs(c).q_over_m"),
    "a given teacher divided by its sum": (FORMULAS, "given ? T(1) : row.sum_p;", "row.sum_p;"),
    "the filling of a group": (DRIVER, "z[i] = w[i] = -infinity<T>();", "z[i] = w[i] = T(-3);"),
    "sums left behind by a max": (DRIVER, "total = raised<Direction>(total, max_q, max_p);", "total.max_q = max_q;"),
    "exponentials left behind by a max": (DRIVER, "kept.max_q[begin / kPairBlock] - row.max_q", "T(0)"),
    "an infinity of a mass that is gone": (DRIVER, "!Direction::in_one_pass || !finite", "!Direction::in_one_pass"),
    "an ignored row": (ARGUMENTS, "args.labels[row] == args.ignore_index", "args.labels[row] < args.ignore_index"),
    "temperature, slope": (DRIVER, "weighed(weight, T(args.scale / args.temperature))", "weighed(weight, T(1))"),
}
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]


def build(folder: Path, edit: tuple[str, str, str] | None) -> ctypes.CDLL:
    source = planted(folder, *edit) if edit else Path(shutil.copytree(CSRC, folder / "csrc"))
    keep_one_type(source, "double")
    library = folder / "kernels.so"
    driver = Path(__file__).with_name("distillation_driver.cpp")
    command = [*COMPILER.split(), *FLAGS, "-shared", f"-I{source}", str(driver), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def agrees(kernels: Kernels) -> bool:
    return all(
        agrees_on(kernels, *pair((5, classes), torch.float64, teacher_is, classes), direction, teacher_is)
        for classes in (7, 40, 2100)
        for direction in DIRECTIONS
        for teacher_is in TEACHERS
    ) and forgets(kernels)


def run(
    kernels: Kernels, student: Tensor, teacher: Tensor, labels: Tensor, direction: str, teacher_is: str
) -> tuple[Tensor, Tensor, Tensor]:
    losses, in_forward, grad = torch.empty(len(student)).double(), torch.empty_like(student), torch.empty_like(student)
    kernels.run_distillation(
        DIRECTIONS.index(direction), TEACHERS.index(teacher_is), *map(ctypes.c_int64, student.shape),
        *map(pointer, (student, teacher, labels)), ctypes.c_double(1.7),
        ctypes.c_double(0.3), *map(pointer, (losses, in_forward, grad)),
    )  # fmt: skip
    return losses, in_forward, grad


def agrees_on(kernels: Kernels, student: Tensor, teacher: Tensor, direction: str, teacher_is: str) -> bool:
    if teacher_is == "probs":
        teacher = 1.5 * teacher
    student[:, -1] += 5  # the last block has the max
    labels = torch.tensor([0, 1, -100, 2, 3])
    losses, in_forward, grad = run(kernels, student, teacher, labels, direction, teacher_is)
    exact_student = student.clone().requires_grad_()
    exact = rows(exact_student, teacher, direction, teacher_is, 1.7, 0.3).where(labels != -100, 0.0)
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_student)
    return all(
        torch.allclose(got, expected, rtol=1e-11, atol=1e-13)
        for got, expected in ((losses, exact.detach()), (in_forward, exact_grad), (grad, exact_grad))
    )


def forgets(kernels: Kernels) -> bool:
    """A mass behind a mask, which two more blocks make nothing, each by a part that is still a number."""
    student, teacher = torch.zeros(1, 3072).double(), torch.zeros(1, 3072).double()
    student[0, :1024] = -math.inf
    teacher[0, :1024], teacher[0, 1024:2048] = -1700.0, -850.0
    losses, *_ = run(kernels, student, teacher, torch.zeros(1, dtype=torch.int64), "forward", "logits")
    return abs(losses.item() - math.log(2)) < 1e-12


def test_the_kernels_as_they_are_agree(tmp_path):
    assert agrees(build(tmp_path, None))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, tmp_path):
    assert not agrees(build(tmp_path, MUTANTS[mutant]))
