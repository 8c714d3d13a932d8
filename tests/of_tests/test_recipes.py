"""The two recipes of CONTRIBUTING.md: their C++ compiles where it says, and gives what their Python gives."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from compiler import COMPILER, CSRC, ROOT
from marks import needs_compiler, on_cpu_alone
from torch import Tensor

from fusedloss import _route
from fusedloss.losses import cross_entropy, difference

# A loss at a point: its value, and its slope by x.
POINTWISE = """
template <template <class> class Functor, bool taken>
void at_a_point(double x, double t, const double* params, double* results) {
  if constexpr (taken) {
    const Functor<double> loss(params);
    results[0] = loss.value(x, t), results[1] = loss.grad(x, t);
  }
}
"""
# Of a row of two classes, whose second one is the target: its loss, and its slope by the target's logit.
SOFTMAX = """
template <template <class> class Functor, bool taken>
void at_a_point(double other, double own, const double* params, double* results) {
  if constexpr (taken) {
    const Functor<double> loss(params, 2);
    const Row<double> row = complete<Functor<double>>(RowStatistics<double>{other, 1, 0, 0}, own, 1.0);
    results[0] = loss.value(row, 1.0);
    results[1] = gradient_of_row(loss, row, ZAndSlope<double>{own, 1}, 1.0, 1.0, 0.0).own;
  }
}
"""
# The loss is found by its name in the list.
PROGRAM = """
#include <string_view>
#include "losses/HEADER"
using namespace fusedloss::baseline;
FUNCTION
extern "C" void compute(double first, double second, const double* params, double* results) {
#define X(name, Functor) at_a_point<Functor, std::string_view(#name) == "NAME">(first, second, params, results);
  LIST(X)
}
"""
Compute = Callable[[float, float, list[float]], tuple[float, float]]


def blocks(section: str, language: str) -> list[str]:
    _, begin, rest = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n## {section}")
    assert begin, f"expected a section {section} in CONTRIBUTING.md"
    return re.findall(rf"^```{language}\n(.*?)^```", rest.partition("\n## ")[0], re.MULTILINE | re.DOTALL)


def with_recipe(header: Path, list_name: str, functor: str, lines: str) -> None:
    """Puts the functor above the list, and its line at the end of the list, below the one that the recipe shows."""
    text = header.read_text()
    (entries,) = re.findall(rf"#define {list_name}\(X\)(?:.*\\\n)+.*\n", text)
    before, new = (line.strip(" \\") for line in lines.splitlines())
    assert before in entries, f"the recipe puts its line below {before}, which {header.name} does not have"
    within = re.search(r"\n}  // namespace fusedloss::FUSEDLOSS_ISA\n", text)
    assert within
    text = text.replace(entries, f"{entries.rstrip()} {new}\n")
    header.write_text(text[: within.start()] + f"\n{functor}" + text[within.start() :])


def compiled(folder: Path, family: str, section: str, name: str, function: str) -> Compute:
    header, list_name = f"{family}.h", f"FUSEDLOSS_{family.upper()}"
    functor, lines = blocks(section, "cpp")
    with_recipe(Path(shutil.copytree(CSRC / "losses", folder / "losses")) / header, list_name, functor, lines)
    program = PROGRAM.replace("HEADER", header).replace("LIST", list_name).replace("NAME", name)
    source, library = folder / "recipe.cpp", folder / "recipe.so"
    source.write_text(program.replace("FUNCTION", function))
    flags = ["-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run([*COMPILER.split(), *flags, str(source), "-o", str(library)], check=True)
    called = ctypes.CDLL(str(library)).compute
    called.argtypes = [ctypes.c_double, ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p]

    def compute(first: float, second: float, params: list[float]) -> tuple[float, float]:
        results = (ctypes.c_double * 2)(float("nan"), float("nan"))
        called(first, second, (ctypes.c_double * len(params))(*params), results)
        return results[0], results[1]

    return compute


def python(section: str, family: ModuleType) -> dict[str, Any]:
    """What the Python block defines beside the losses of its file, natively: no kernel has its name."""

    def as_it_is(*arguments: Any, **options: Any) -> Callable[[Any], Any]:
        return lambda formula: formula

    names = {
        **vars(family),
        "_route": SimpleNamespace(REDUCTIONS=_route.REDUCTIONS, pointwise=as_it_is, softmax=as_it_is),
    }
    (block,) = blocks(section, "python")
    exec(compile(block, f"CONTRIBUTING.md, {section}", "exec"), names)
    return names


def value_and_slope(loss: Callable[[Tensor], Tensor], at: float) -> tuple[float, float]:
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = loss(x)
    return value.item(), torch.autograd.grad(value, x)[0].item()


POINTS = [(0.3, -1.1), (2.0, 2.0), (-4.0, 3.5)]


@needs_compiler
@on_cpu_alone("the recipe names no device")
def test_the_pointwise_recipe(tmp_path: Path) -> None:
    section = "Add a pointwise loss"
    compute = compiled(tmp_path, "pointwise", section, "cauchy", POINTWISE)
    loss = python(section, difference)["cauchy_loss"]
    for x, t in POINTS:
        target = torch.tensor(t, dtype=torch.float64)
        expected = value_and_slope(lambda x, target=target: loss(x, target, scale=0.7), x)
        assert compute(x, t, [0.7]) == pytest.approx(expected, rel=1e-12)


@needs_compiler
@on_cpu_alone("the recipe names no device")
def test_the_softmax_recipe(tmp_path: Path) -> None:
    section, params = "Add a softmax loss", [0.7, -0.3, 0.2, 0.1]
    compute = compiled(tmp_path, "softmax", section, "poly_cross_entropy", SOFTMAX)
    loss = python(section, cross_entropy)["poly_cross_entropy"]
    for other, own in POINTS:
        first = torch.tensor(other, dtype=torch.float64)

        def of_row(own: Tensor, first: Tensor = first) -> Tensor:
            return loss(torch.stack([first, own])[None], torch.tensor([1]), None, *params)

        assert compute(other, own, params) == pytest.approx(value_and_slope(of_row, own), rel=1e-12)
