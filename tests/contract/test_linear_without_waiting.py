"""Linear losses on a device whose numbers the host must not wait for."""

import linear_calls as calls
import pytest
import torch
from compare import upstreams
from linear_calls import IGNORED, ROUTES, call, exact_grads, grads, indices, norm_error, operands
from losses import DTYPES
from marks import needs_extension, on_cpu_alone
from torch.profiler import ProfilerActivity, profile

EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes as they are on a GPU, which leave no row out and read no number."""
    from fusedloss.linear._call import Call

    monkeypatch.setattr(Call, "on_host", False)


@pytest.mark.thinned(1)
@needs_extension
@on_cpu_alone("puts the CPU in the place of a GPU")
@EACH_DTYPE
@EACH_ROUTE
@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_nothing_waits_for_a_device(no_waiting, positions, route, dtype):
    leaves, target = operands(dtype=dtype, positions=positions), indices(positions=positions)
    expected = exact_grads(leaves, target.reshape(23, *([3] if positions else [])), **ROUTES[route])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        results = call(leaves, target, **ROUTES[route])
        got = torch.autograd.grad(results, leaves, upstreams(*results))
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    assert not waits & {event.name for event in profiled.events()}
    for each, exact in zip(got, expected, strict=True):
        assert norm_error(each, exact) < calls.WITHIN[dtype]


@pytest.mark.thinned(1)
@needs_extension
@on_cpu_alone("puts the CPU in the place of a GPU")
@EACH_DTYPE
@EACH_ROUTE
def test_without_waiting_ignored_rows_reach_nothing(no_waiting, route, dtype):
    leaves, target = operands(dtype=dtype), indices()
    finite = exact_grads(leaves, target, **ROUTES[route])
    if "return_lse" not in ROUTES[route]:  # of every row
        with torch.no_grad():
            leaves[0][target == IGNORED] = torch.nan
    for got, exact in zip(grads(call(leaves, target, **ROUTES[route]), leaves), finite, strict=True):
        assert norm_error(got, exact) < calls.WITHIN[dtype]
    loss = call(leaves, torch.full_like(target, IGNORED), **ROUTES[route])[:1]
    for got in grads(loss, leaves):
        assert not got.any()


@needs_extension
@on_cpu_alone("puts the CPU in the place of a GPU")
def test_without_waiting_products_in_float16_do_not_overflow(no_waiting):
    input, head, bias = (each.detach() for each in operands(dtype=torch.float16))
    leaves = [(input / 100).requires_grad_(), (head * 300).requires_grad_(), bias.requires_grad_()]
    target = indices()
    results = call(leaves, target, grad_in_forward=False)
    for got, exact in zip(grads(results, leaves), exact_grads(leaves, target), strict=True):
        assert norm_error(got, exact) < calls.WITHIN[torch.float16]
