"""Linear losses on a GPU: bad targets, of which the host hears later."""

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
