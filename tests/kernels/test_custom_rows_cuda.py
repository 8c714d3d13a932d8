"""A loss of rows of one's own as CUDA kernels: run on the CPU, and compiled by nvcc."""

import re
import shutil
from pathlib import Path

import nvcc
import pytest
import torch
from compiler import CSRC
from executor import (
    BACKWARD,
    DIVISOR,
    FORWARD,
    SANITIZED,
    UNOPTIMISED,
    Guarded,
    assert_close,
    build,
    filled,
    header,
    loaded,
    pretend,
    rebuilt,
    run_softmax,
)  # fmt: skip
from marks import needs_compiler, needs_extension
from torch import Tensor

from fusedloss.custom import _rows, _source

pytestmark = [needs_extension, needs_compiler]

VALUE, PARAMS = "weight * pow(q, gamma) * ce + z * square(lse)", {"gamma": 1.7, "z": 0.01}
SHAPES = [(1, 1), (40, 3), (300, 64), (9, 515), (40, 257), (2, 7000), (3, 21, 33), (2, 70, 32)]


def functor(value: str, params: dict[str, float]) -> str:
    return _source.row_functor(_rows._trees(value, None, params)[2], params)


@pytest.fixture(scope="module")
def own(kernels, tmp_path_factory):
    """The executor's kernels with this loss alone in the list, in the place of cross-entropy."""
    source = Path(shutil.copytree(CSRC, tmp_path_factory.mktemp("own") / "csrc"))
    (source / "losses" / "own.h").write_text(f'#pragma once\n#include "custom_row.h"\n{functor(VALUE, PARAMS)}')
    losses = source / "losses" / "softmax.h"
    listed, one_loss = r"(#define \w+\(X\))( *\\\n  X\(.*\))+", r'#include "own.h"\n\1 X(cross_entropy, Own)'
    text, lists = re.subn(listed, one_loss, losses.read_text())
    assert lists == 1
    losses.write_text(text)
    rebuilt(kernels, source, "softmax")
    built = Path(kernels._name).parent
    build(source.parent, source, "unit", [*UNOPTIMISED, *header(built, *UNOPTIMISED)])
    return loaded(source.parent)


@pytest.mark.deep("a loss of rows of one's own on the executor; it runs on the CPU, and the drivers ran", minutes=1)
@pytest.mark.skipif(SANITIZED, reason="the drivers are looked at with the losses of the list")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_columns(own, shape: tuple[int, ...], smoothing: float) -> None:
    pretend(own, seed=len(shape))
    generator = torch.Generator().manual_seed(0)
    x = filled(2 * torch.randn(shape, generator=generator, dtype=torch.float64), torch.float32).tensor
    rows = x.numel() // shape[1]
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    if rows > 1:
        target.view(-1)[1::8] = -100
    weight = torch.rand(shape[1], generator=generator) + 0.5
    params = (smoothing, *PARAMS.values())
    native = _rows._formula("own", _rows._trees(VALUE, None, PARAMS)[0], tuple(PARAMS))

    def exact(reduction: str, upstream: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.double().requires_grad_()
        value = native(leaf, target, weight.double(), reduction, -100, *params)
        return value.detach(), torch.autograd.grad(value, leaf, upstream.double())[0]

    statistics, grad = Guarded.like((4 * rows + 1,), torch.float32), Guarded.like(shape, torch.float32)
    losses, total = torch.empty(target.shape), torch.empty(())
    everything = {
        "name": "cross_entropy", "params": params, "logits": x, "target": target, "weight": weight,
        "statistics": statistics.tensor, "divisor": statistics.tensor[-1:],
    }  # fmt: skip
    each, one = torch.rand(target.shape, generator=generator) + 0.5, torch.tensor(1.5)
    run_softmax(own, FORWARD, **everything, losses=losses)
    run_softmax(own, BACKWARD, **everything, grad=grad.tensor, upstream=each)
    expected, expected_grad = exact("none", each)
    assert_close(losses, expected, torch.float32, "losses")
    assert_close(grad.tensor, expected_grad, torch.float32, "gradients")
    run_softmax(own, DIVISOR, **everything, mean=True)
    run_softmax(own, FORWARD, **everything, mean=True, total=total, grad=grad.tensor)
    expected, expected_grad = exact("mean", one)
    assert_close(total, expected, torch.float32, "mean")
    assert_close(grad.tensor, expected_grad / 1.5, torch.float32, "gradient in forward")
    assert statistics.intact() and grad.intact()


@pytest.mark.skipif(SANITIZED, reason="the other run does it")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc; the executor compiles the same kernels")
@pytest.mark.deep("what nvcc says of a loss of rows of one's own; it ran on the CPU", minutes=1)
def test_nvcc_compiles_it_without_local_memory(tmp_path: Path) -> None:
    units = _source.of_rows(functor("pow(q, gamma) * ce", {"gamma": 2.0}), "", True)
    with_kernels = set(units) - {"targets.cu"}  # of which no loss of one's own has any
    files = [tmp_path / name for name in sorted(with_kernels) if name.endswith(".cu")]
    for file in files:
        file.write_text(units[file.name])
    architecture = nvcc.supported()[-1]
    functions = nvcc.functions(nvcc.compile(files, [architecture]), architecture)
    assert sum("Expression" in function.name for function in functions) > 40
    assert not nvcc.using_local_memory(functions)
