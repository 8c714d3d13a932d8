"""torch.use_deterministic_algorithms fills uninitialised memory; what a kernel writes whole is not written twice."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import same, upstream_of, value_and_grads
from layouts import laid_out
from losses import ONE_OF_EACH, POINTWISE, REDUCTIONS, each_of
from marks import needs_extension
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedloss.functional as L

pytestmark = needs_extension


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def fills(run: Callable[[], Any]) -> int:
    """Of memory that was just allocated."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    fills = [event for event in profiled.events() if event.name == "aten::fill_" and event.cpu_parent]
    return sum(event.cpu_parent.name.startswith("aten::empty") for event in fills)


def fills_of_step(run: Callable[[Tensor], Tensor], input: Tensor) -> int:
    x = input.detach().requires_grad_()
    upstream = upstream_of(run(x))
    return fills(lambda: torch.autograd.grad(run(x), x, upstream))


@pytest.mark.thinned()
@each_of(ONE_OF_EACH)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "misaligned"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_filled(deterministic, loss, layout, reduction):
    assert fills(lambda: torch.empty(3)) == 1
    input, target = loss.data((6, 5), torch.float32)
    input = laid_out(input, layout)
    assert fills_of_step(lambda x: loss.fused(x, target, reduction), input) == 0


@each_of([loss for loss in POINTWISE if loss in ONE_OF_EACH])
def test_nothing_is_filled_where_torch_chooses_the_order_of_the_losses(deterministic, loss):
    input, target = loss.data((6, 5), torch.float32)
    target = laid_out(target, "transposed")
    assert fills_of_step(lambda x: loss.fused(x, target, "none"), input) == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_filled_over_class_indices(deterministic, reduction):
    input, target = torch.randn(6, 5), torch.tensor([0, 5, 2, -100, 4, 1])
    run = lambda x: L.sigmoid_focal_loss(x, target, reduction=reduction, ignore_index=-100)  # noqa: E731
    assert fills_of_step(run, input) == 0


@pytest.mark.thinned()
@each_of(ONE_OF_EACH)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "misaligned"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_results_are_those_of_the_mode_switched_off(loss, layout, reduction):
    input, target = loss.data((6, 5), torch.float32)
    input = laid_out(input, layout)
    run = lambda x: loss.fused(x, target, reduction)  # noqa: E731
    expected = value_and_grads(run, input)
    torch.use_deterministic_algorithms(True)
    try:
        got = value_and_grads(run, input)
    finally:
        torch.use_deterministic_algorithms(False)
    same(got, expected, rtol=0, atol=0)
    strides = [torch.empty_like(input).stride(), *([expected[0].stride()] if reduction == "none" else [])]
    assert [got[1].stride(), *([got[0].stride()] if reduction == "none" else [])] == strides
