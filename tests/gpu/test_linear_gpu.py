"""Linear losses on a GPU: bad targets, of which the host hears later, and graphs."""

from collections.abc import Callable

import linear_calls as calls
import pytest
import torch
import torch.nn.functional as F
from linear_calls import CLASSES, IGNORED, ROUTES, call, exact_grads, grads, indices, norm_error, operands
from losses import DTYPES, GPU, ON_GPU
from torch import Tensor

import fusedloss
import fusedloss.functional as L

pytestmark = pytest.mark.skipif(not ON_GPU, reason="no GPU, or no CUDA kernels in the extension")
hardware = pytest.mark.hardware(reason="needs a GPU: its streams and graphs")
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(autouse=True)
def _on_gpu():
    torch.set_default_device(GPU)
    yield
    torch.set_default_device(None)


def told() -> None:
    """Raises what the kernels have found."""
    torch.get_device_module(GPU).synchronize()
    fusedloss.check()


@pytest.mark.thinned
@pytest.mark.parametrize("bad", [-1, CLASSES, 2**40])
@pytest.mark.parametrize("chunk_rows", [5, 100])
@EACH_ROUTE
@EACH_DTYPE
def test_a_bad_target_is_told(dtype, route, chunk_rows, bad):
    leaves, target = operands(dtype=dtype), indices()
    target[17] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):  # perhaps by the next chunk
        grads(call(leaves, target, chunk_rows, **ROUTES[route]), leaves)
        told()
    target[17] = IGNORED
    got = grads(call(leaves, target, chunk_rows, **ROUTES[route]), leaves)
    told()
    for each, exact in zip(got, exact_grads(leaves, target, **ROUTES[route]), strict=True):
        assert norm_error(each, exact) < calls.WITHIN[dtype]


@EACH_DTYPE
@EACH_ROUTE
def test_a_bad_target_harms_no_other_row(route, dtype):
    """The results are cross_entropy's of the logits."""
    leaves, target = operands(dtype=dtype), indices()
    target[17] = CLASSES

    def run(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> list[Tensor]:
        made = function()
        results = [made] if isinstance(made, Tensor) else list(made)
        got = [*results, *grads(results, leaves)]
        with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds. It stood in row 17"):
            told()
        return [each.detach() for each in got]

    ours = run(lambda: tuple(call(leaves, target, chunk_rows=100, **ROUTES[route])))
    expected = run(lambda: L.cross_entropy(F.linear(*leaves), target, **ROUTES[route]))
    assert ours[0].isnan().sum() == 1
    for got, each in zip(ours, expected, strict=True):
        assert torch.equal(got.isnan(), each.isnan())
        assert norm_error(got.nan_to_num(), each.nan_to_num().double()) < 2 * calls.WITHIN[dtype]


@hardware
@EACH_DTYPE
@EACH_ROUTE
def test_nothing_waits_for_the_device(route, dtype):
    leaves, target = operands(dtype=dtype), indices()
    grads(call(leaves, target, **ROUTES[route]), leaves)  # modules are loaded at their first use, which may wait
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second
        grads(call(leaves, target, **ROUTES[route]), leaves)
        done.record()
        assert not done.query()  # torch's mode sees torch's own calls alone
    finally:
        torch.cuda.set_sync_debug_mode("default")


@hardware
@EACH_DTYPE
@EACH_ROUTE
def test_a_captured_step_follows_its_inputs(route, dtype):
    leaves, target = operands(dtype=dtype), indices()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            grads(call(leaves, target, **ROUTES[route]), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = grads(call(leaves, target, **ROUTES[route]), leaves)
    with torch.no_grad():
        for each in leaves:
            each.copy_(each.flip(0))
        target.copy_(target.roll(1))
    graph.replay()
    for each, exact in zip(got, exact_grads(leaves, target, **ROUTES[route]), strict=True):
        assert norm_error(each, exact) < calls.WITHIN[dtype]
