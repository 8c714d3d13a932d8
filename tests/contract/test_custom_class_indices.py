"""Pointwise losses of one's own over class indices, without a one-hot."""

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, same, value_and_grad
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import bytes_allocated, compiled_with_ops
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import cpp_extension

import fusedloss

COMPILER = cpp_extension.get_cxx_compiler().split()[0]
pytestmark = [
    needs_extension,
    on_cpu_alone("compiles for the CPU; test_index_targets.py runs the kernels over class indices on a GPU"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler; test_index_targets.py runs natively"),
]
VALUE = "pos * t * softplus(-x) + (1 - t) * softplus(x)"  # that of docs/own-losses.md, compiled once for both
SHAPES = [(6, 5), (40, 300), (3, 5, 4), (2, 30, 5, 7)]


@pytest.fixture(scope="module")
def loss() -> Any:
    return fusedloss.pointwise_loss("weighted_bce", VALUE, params={"pos": 3.0})


def plain(x: Tensor, y: Tensor, reduction: str, weight: Tensor | float = 1.0, pos: float = 3.0) -> Tensor:
    kept = (y != -7).unsqueeze(1)
    t = F.one_hot(torch.where((y < 0) | (y == -7), x.shape[1], y), x.shape[1] + 1)[..., :-1].movedim(-1, 1).to(x.dtype)
    losses = (pos * t * F.softplus(-x) + (1 - t) * F.softplus(x)) * weight
    losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / (kept.sum() * x.shape[1] if reduction == "mean" else 1)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Some rows are ignored, some are the background."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(-1, shape[1] + 1, shape[:1] + shape[2:], generator=generator)
    y.view(-1)[1::4] = -7
    return x, y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_of_the_one_hot(loss: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, y = data(shape, dtype)
        x.movedim(1, -1)[y == -7] = torch.nan
        wide = torch.where((y == -7).unsqueeze(1), 0, x.double())
        weight = torch.rand(shape[1], *[1] * (len(shape) - 2), dtype=torch.float64).to(dtype)
        assert fusedloss.explain(loss, x, y, "mean", weight, -7).startswith("fused: cpu")
        for reduction in REDUCTIONS:
            *got, upstream = value_and_grad(lambda x, y, r: loss(x, y, r, weight, -7), x, y, reduction)  # noqa: B023
            of_weight = lambda x, y, r: plain(x, y, r, weight.double())  # noqa: E731, B023
            *exact, _ = value_and_grad(of_weight, wide, y, reduction, upstream)
            for one, other in zip(got, exact, strict=True):
                assert one.dtype == dtype
                assert_close(one, other, 1.02 if dtype in HALVES else 48)


def test_derivatives_parameters_and_other_integers(loss: Any) -> None:
    x, y = data((4, 5))
    x.requires_grad_()
    for reduction in REDUCTIONS:
        run = lambda x: loss(x, y, reduction, ignore_index=-7, pos=2.0)  # noqa: E731, B023
        same(run(x), plain(x, y, reduction, pos=2.0))
        assert gradcheck(run, x) and gradgradcheck(run, x)
    same(loss(x, y.int(), ignore_index=-7), loss(x, y, ignore_index=-7))
    same(loss._native(x, y, None, "mean", 3.0, ignore_index=-7), loss(x, y, ignore_index=-7))


def test_compiled_and_without_a_one_hot(loss: Any) -> None:
    x, y = data((64, 300), torch.float32)
    compiled, graphs = compiled_with_ops(lambda x, y, r: loss(x, y, r, ignore_index=-7))
    run = lambda x, y, r: loss(x, y, r, ignore_index=-7)  # noqa: E731
    same(value_and_grad(compiled, x, y, "mean")[:2], value_and_grad(run, x, y, "mean")[:2])
    assert any("fusedloss.custom_weighted_bce" in target for target in graphs)
    assert bytes_allocated(lambda: loss(x, y, ignore_index=-7)) < 1000


def test_bad_calls(loss: Any) -> None:
    x, y = data((6, 5))
    for raised, message, call in (
        (
            TypeError,
            r"weighted_bce\(\): argument 'ignore_index' must be int, not str",
            lambda: loss(x, y, ignore_index="1"),
        ),
        (TypeError, "expected class indices for targets beside an ignore_index", lambda: loss(x, x, ignore_index=-7)),
        (ValueError, "for class indices that of inputs", lambda: loss(x, y[:3], ignore_index=-7)),
        (IndexError, "Target 6 is out of bounds", lambda: loss(x, y.clone().fill_(6), ignore_index=-7)),
    ):
        with pytest.raises(raised, match=message):
            call()
    with pytest.raises(ValueError, match="cannot be named ignore_index"):
        fusedloss.pointwise_loss("wrong", "x * ignore_index - t", params={"ignore_index": 1.0})


def test_an_ignored_row_harms_no_sum_where_the_loss_of_zeros_is_no_number(loss: Any) -> None:
    """The kernels count it as x = t = 0 of weight 0: of an expression that is infinite there PyTorch takes the call."""
    infinite = fusedloss.pointwise_loss("logarithm", "t * log(x + eps) - x", params={"eps": 0.5})
    x, y = torch.rand(6, 5, dtype=torch.float64) + 0.5, data((6, 5))[1]
    assert fusedloss.explain(infinite, x, y, ignore_index=-7).startswith("fused")
    why = "native: class indices, and no finite value at x = 0 and t = 0"
    assert fusedloss.explain(infinite, x, y, ignore_index=-7, eps=0.0) == why
    assert infinite(x, y, "sum", ignore_index=-7, eps=0.0).isfinite()
    compiled = torch.compile(
        lambda x, y: infinite(x, y, "sum", ignore_index=-7, eps=0.0), backend="eager", fullgraph=True
    )
    same(compiled(x, y), infinite(x, y, "sum", ignore_index=-7, eps=0.0))
