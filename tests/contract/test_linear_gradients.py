"""The backward of a linear loss: only what is asked for, any number of times, in every kind of autograd."""

import gc
import weakref
from typing import Any

import linear_calls as calls
import pytest
import torch
import torch.nn.functional as F
from compare import upstreams
from linear_calls import ROUTES, call, exact_grads, grads, indices, norm_error, operands
from losses import DTYPES, HALVES
from marks import needs_extension, on_cpu_alone
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fusedloss.functional as L

EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"cross_entropy {name}": ("linear_cross_entropy", options) for name, options in ROUTES.items()},
    "cross_entropy with all": (
        "linear_cross_entropy",
        {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 3.0, "logit_scale": 0.7, "reduction": "sum"},
    ),
    "focal": ("linear_focal_loss", {"alpha": 0.5, "gamma": 1.5}),
    "focal of each row": ("linear_focal_loss", {"reduction": "none"}),
    "log_probs": ("linear_log_probs", {"temperature": 0.7}),
    "log_probs and entropy": ("linear_log_probs", {"return_entropy": True}),
}


def products(run: Any) -> int:
    """How many matrix products ran."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    return sum(event.name.startswith(("aten::mm", "aten::addmm")) for event in profiled.events())


@pytest.mark.thinned(1)
@needs_extension
@on_cpu_alone("counts the operators of the CPU")
@EACH_ROUTE
@pytest.mark.parametrize(("dtype", "chunks"), [(torch.float32, 4), (torch.bfloat16, 1)], ids=str)
@pytest.mark.parametrize("asked", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
def test_what_is_frozen_costs_no_product(asked, dtype, chunks, route):
    target = indices((40,)).clamp_min(0)
    leaves = [leaf.requires_grad_(bool(want)) for leaf, want in zip(operands((40,), dtype), asked, strict=True)]
    made: list[Tensor] = []

    def step() -> None:
        results = call(leaves, target, chunk_rows=40 // chunks, **ROUTES[route])
        torch.autograd.backward(results, upstreams(*results))
        made.extend(results)

    logits = 1 if route == "in forward" else 2
    assert products(step) == chunks * (logits + sum(asked))
    expected = exact_grads(operands((40,), dtype), target, **ROUTES[route])
    for leaf, want, exact in zip(leaves, asked, expected, strict=True):
        if want:
            assert norm_error(leaf.grad, exact) < calls.WITHIN[dtype]
        else:
            assert leaf.grad is None


@pytest.mark.thinned(1)
@needs_extension
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EACH_ROUTE
@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_frozen_parts_in_half_precision(asked, route, dtype):
    target = indices()
    leaves = [leaf.requires_grad_(bool(want)) for leaf, want in zip(operands(dtype=dtype), asked, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = exact_grads(leaves, target, **ROUTES[route])
    results = call(leaves, target, **ROUTES[route])
    exact = [grad for grad, want in zip(expected, asked, strict=True) if want]
    for got, each in zip(grads(results, wanted), exact, strict=True):
        assert norm_error(got, each) < calls.WITHIN[dtype]


@needs_extension
@EACH_DTYPE
@EACH_ROUTE
def test_a_second_backward_gives_the_same_bits_and_scales_once(route, dtype):
    leaves, target = operands(dtype=dtype), indices()
    results = call(leaves, target, **ROUTES[route])
    first = grads(results, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    doubled_upstreams = [2 * upstream for upstream in upstreams(*results)]
    second = torch.autograd.grad(results, leaves, doubled_upstreams, retain_graph=True)
    third = grads(results, leaves)
    for one, copy, other, twice in zip(first, kept, third, second, strict=True):
        assert torch.equal(one, copy) and torch.equal(one, other)
        torch.testing.assert_close(twice, 2 * one)


@needs_extension
@EACH_ROUTE
@pytest.mark.parametrize("changed", range(4))
def test_an_operand_that_was_changed_is_told(changed, route):
    leaves, target = operands(), indices()
    given = [leaf * 1 for leaf in leaves]
    results = call(given, target, **ROUTES[route])
    with torch.no_grad():
        (*given, target)[changed].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(results, leaves)


@EACH_ROUTE
def test_saved_tensors_may_be_packed_and_a_call_checkpointed(route):
    leaves, target = operands(), indices()
    expected = grads(call(leaves, target, **ROUTES[route]), leaves)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: packed.append(each) or len(packed) - 1, packed.__getitem__
    ):
        results = call(leaves, target, **ROUTES[route])
    assert packed
    torch.testing.assert_close(grads(results, leaves), expected)
    results = checkpoint(lambda *given: call(given, target, **ROUTES[route]), *leaves, use_reentrant=False)
    torch.testing.assert_close(grads(results, leaves), expected)


@needs_extension
def test_hooks_hear_of_gradients_that_forward_made():
    """What a saved-tensor hook does not see would stay on the device."""
    leaves, target = operands(), indices()
    plain = call(leaves, target)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: each, lambda each: each):
        hooked = call(leaves, target)
    assert plain[0].grad_fn.name() != hooked[0].grad_fn.name()


@pytest.mark.thinned(1)
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name, chunk_rows, positions):
    function, options = CALLS[name]
    leaves = operands((5,), torch.float64, positions, features=2, classes=3)
    target = indices((5,), positions, classes=3)

    def run(input: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return getattr(L, function)(input, weight, target, linear_bias=bias, chunk_rows=chunk_rows, **options)

    assert gradcheck(run, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("chunk_rows", [None, 5])
@EACH_ROUTE
def test_transforms(route, chunk_rows):
    (input, weight, bias), target = operands(dtype=torch.float64), indices()
    own = lambda h: call((h, weight, bias), target, chunk_rows, **ROUTES[route])[0].sum()  # noqa: E731
    reduction = ROUTES[route].get("reduction", "mean")
    torchs = lambda h: F.cross_entropy(F.linear(h, weight, bias), target, reduction=reduction).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(own)(input), torch.func.grad(torchs)(input))
    several = torch.stack([input, 2 * input]).detach()
    torch.testing.assert_close(torch.func.vmap(own)(several), torch.func.vmap(torchs)(several))
    tangent = torch.ones_like(input)
    for got, expected in zip(*(torch.func.jvp(f, (input,), (tangent,)) for f in (own, torchs)), strict=True):
        torch.testing.assert_close(got, expected)
    rows = slice(0, 2)
    small = lambda f: lambda h: f(torch.cat([h, input[2:]]))  # noqa: E731
    torch.testing.assert_close(*(torch.func.hessian(small(f))(input[rows]) for f in (own, torchs)))
    torch.testing.assert_close(
        *(torch.autograd.functional.hessian(small(f), input[rows], vectorize=True) for f in (own, torchs))
    )


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_traced_function_runs_on_other_inputs(chunk_rows):
    (input, weight, bias), target = operands(), indices()
    run = lambda h, w, b: call((h, w, b), target, chunk_rows)[0]  # noqa: E731
    traced = torch.jit.trace(run, (input, weight, bias))
    others = (2 * input, 3 * weight, bias)
    torch.testing.assert_close(traced(*others), F.cross_entropy(F.linear(*others), target))


@EACH_ROUTE
def test_a_head_that_is_tied_to_its_input(route):
    embedding, target = operands((11,), torch.float64)[1], indices((11,))
    reduction = ROUTES[route].get("reduction", "mean")
    for hidden in (lambda: embedding, lambda: embedding[target.clamp_min(0)].tanh()):
        got = call((hidden(), embedding), target, **ROUTES[route])[:1]
        expected = [F.cross_entropy(hidden() @ embedding.T, target, reduction=reduction)]
        torch.testing.assert_close(grads(got, [embedding]), grads(expected, [embedding]))


@EACH_ROUTE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode, route):
    leaves, target = operands(), indices()
    expected = call(leaves, target, **ROUTES[route])
    with mode():
        results = call(leaves, target, **ROUTES[route])
    for got, each in zip(results, expected, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, each.detach())


@needs_extension
@EACH_ROUTE
def test_nothing_is_kept_alive(route):
    leaves, target = operands(), indices()
    gc.disable()
    try:
        for backward in (False, True):
            given = [leaf * 1 for leaf in leaves]
            results = call(given, target, **ROUTES[route])
            if backward:
                grads(results, leaves)
            alive = [weakref.ref(each) for each in given]
            del results, given
            assert all(each() is None for each in alive)
    finally:
        gc.enable()
