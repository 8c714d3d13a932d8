"""Any number of threads: the same bits, the same errors, and work for each of them."""

import os
from collections.abc import Callable
from contextlib import suppress

import index_calls
import pytest
import torch
from compare import upstream_of, value_and_grad
from layouts import laid_out
from losses import LOSSES, ONE_OF_EACH, REDUCTIONS, SOFTMAX, each_of
from marks import needs_extension
from pointwise_calls import BROADCASTING, OF_DIFFERENCE, RAISES, fused, made, random
from torch import Tensor

import fusedloss.functional as L


@pytest.mark.thinned(1)
@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_of(LOSSES)
def test_any_number_of_threads_gives_the_same_bits(loss, dtype, threads):
    shapes = [(3000, 30), (300, 1000), (4, 21, 100, 100), (7, 50257)] if loss in SOFTMAX else [(1_000_003,), (70, 1000)]
    for shape in shapes:
        x, target = loss.data(shape, dtype)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append([value_and_grad(loss.fused, x, target, r)[:2] for r in REDUCTIONS])
        for other in results[1:]:
            for (value, grad), (other_value, other_grad) in zip(results[0], other, strict=True):
                assert torch.equal(value, other_value) and torch.equal(grad, other_grad)


STRIDED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sliced": lambda x, t: (laid_out(x, "sliced"), t),
    "channels_last beside contiguous": lambda x, t: (laid_out(x, "channels_last"), t),
    "inner transposed": lambda x, t: (laid_out(x, "inner transposed"), laid_out(t, "inner transposed")),
    "expanded columns": lambda x, t: (x, laid_out(t, "expanded columns")),
    "mixed": lambda x, t: (x.bfloat16(), t),
    "mixed and sliced": lambda x, t: (laid_out(x.half(), "sliced"), laid_out(t, "channels_last")),
    "broadcast": lambda x, t: (x, t[:, :1, :, :1]),
}


@pytest.mark.thinned(1)
@needs_extension
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize(
    "call", ["mse", "l1, weight", "smooth l1", "huber, weight", "bce, weight", "logits, both", "focal"]
)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_any_number_of_threads_gives_the_same_bits_of_pointwise_calls(call, layout, threads):
    function, _, options = made(call, (4, 8, 61, 113), torch.float32)
    x, t = STRIDED[layout](*made(call, (4, 8, 61, 113), torch.float32)[1])
    if "broadcast" in layout and function not in OF_DIFFERENCE:
        pytest.skip("its operands have one size")
    if "mixed" in layout and function in ("huber_loss", "binary_cross_entropy"):
        pytest.skip("its operands have one dtype")
    assert fused(function, x, t, **options)
    leaves = [x.detach().requires_grad_()]
    if "focal" not in call:
        leaves.append(t.detach().requires_grad_())
        t = leaves[1]
    results = []
    for count in (1, 2, 3):
        threads(count)
        for reduction in REDUCTIONS:
            value = getattr(L, function)(leaves[0], t, **options, reduction=reduction)
            results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
    for i, result in enumerate(results[3:]):
        for one, other in zip(result, results[i % 3], strict=True):
            assert torch.equal(one, other)


@needs_extension
def test_any_number_of_threads_gives_the_same_bits_of_class_indices(threads):
    for shape in [(3000, 80), (3, 21, 100, 100), (1, 200_000)]:
        x, y = index_calls.data(shape, torch.float32)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append([value_and_grad(index_calls.loss(), x, y, reduction)[:2] for reduction in REDUCTIONS])
        for other in results[1:]:
            for (value, grad), (other_value, other_grad) in zip(results[0], other, strict=True):
                assert torch.equal(value, other_value) and torch.equal(grad, other_grad)


@RAISES
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_probability_is_found_by_every_thread(dtype, place, threads):
    threads(3)
    x, t = (random(200_000, seed=i).sigmoid().to(dtype) for i in (1, 2))
    x[place] = 1.5
    for reduction in REDUCTIONS:
        with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
            L.binary_cross_entropy(x, t, reduction=reduction)


@needs_extension
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts threads through /proc, which is Linux's")
@each_of([loss for loss in ONE_OF_EACH if loss.op != "nll"])  # which has next to no work
def test_work_is_spread_over_torchs_threads(loss, threads):
    # CPU time of every thread of the process: on one thread alone, no other one's would grow.
    def cpu_times() -> dict[str, int]:
        times = {}
        for thread in os.listdir("/proc/self/task"):
            # A thread of an earlier test may end between the listing and this.
            with suppress(OSError), open(f"/proc/self/task/{thread}/schedstat") as file:
                times[thread] = int(file.read().split()[0])
        return times

    shape = (2000, 1000) if loss in SOFTMAX else (4_000_000,)
    x, target = loss.data(shape, torch.float32)
    threads(2)
    loss.fused(x, target, "mean")
    before = cpu_times()
    for _ in range(20):
        loss.fused(x, target, "mean")
    after = cpu_times()
    grown = sorted(after[thread] - before.get(thread, 0) for thread in after)
    assert grown[-2] > 0.2 * grown[-1]
