"""Gradients of input and target, what is kept for them, and derivatives beyond the first."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import no_less_exact, same, upstream_of, value_and_grads, warned
from layouts import laid_out
from losses import HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import Recorder, bytes_kept
from pointwise_calls import (
    ALL,
    BINARY,
    BROADCASTING,
    EVERY_DTYPE,
    EVERY_HALF,
    EVERY_REDUCTION,
    OF_DIFFERENCE,
    TORCHS,
    WEIGHTED,
    as_double,
    data,
    elements,
    fused,
    made,
    of_torch,
    random,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fusedloss
import fusedloss.functional as L

# ---- gradients of the target


@EVERY_REDUCTION
@TORCHS
def test_what_inference_mode_made_is_taken_where_torch_takes_it(call, reduction):
    # Autograd saves no such tensor, so that it depends on what a formula saves: that of l1_loss neither operand.
    function, (x, t), options = made(call, (6, 5), torch.float32)
    given = {"input": x, "target": t, **options}
    for name in [name for name, value in given.items() if isinstance(value, Tensor)]:
        leaf = "target" if name == "input" else "input"
        with torch.inference_mode():
            changed = given | {name: given[name].clone()}

        def run(functions, changed=changed, leaf=leaf):
            rest = {name: value for name, value in changed.items() if name != leaf}
            loss = lambda tensor: getattr(functions, function)(**rest, **{leaf: tensor}, reduction=reduction)  # noqa: E731
            return warned(lambda: value_and_grads(loss, changed[leaf]))[0]

        expected, got = run(F), run(L)
        if isinstance(expected, list):
            same(got, expected)
        else:
            assert got == expected


@needs_extension
def test_what_inference_mode_made_is_explained():
    x, t = random(6, 5), random(6, 5, seed=1)
    with torch.inference_mode():
        made_there = t * 1
    reason = "native: a gradient beside a tensor that inference mode made"
    assert fusedloss.explain(L.l1_loss, x.clone().requires_grad_(), made_there) == reason
    assert fused("l1_loss", x, made_there)
    with torch.no_grad():
        assert fused("l1_loss", x.requires_grad_(), made_there)


@pytest.mark.thinned
@EVERY_REDUCTION
@EVERY_DTYPE
@TORCHS
def test_gradients_of_input_and_target_together_and_alone(call, dtype, reduction):
    function, (x, t), options = made(call, (30, 7), dtype)
    run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    value, of_input, of_target = value_and_grads(run, x, t)
    exact = value_and_grads(
        lambda x, t: getattr(F, function)(x, t, **as_double(options), reduction=reduction), x.double(), t.double()
    )
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": eps if dtype in HALVES else 100 * eps, "atol": 1e-5 if dtype in HALVES else 100 * eps}
    for got, expected in zip((value, of_input, of_target), exact, strict=True):
        assert got.dtype == dtype
        same(got.double(), expected, **tolerance)
    assert torch.equal(value_and_grads(lambda x: run(x, t), x)[1], of_input)
    same(value_and_grads(lambda t: run(x, t), t)[1], of_target)


@pytest.mark.parametrize("dtype, other", itertools.permutations([torch.bfloat16, torch.float32, torch.float16], 2))
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss", BINARY[1]])
def test_gradients_have_the_dtype_of_their_tensor(function, dtype, other):
    x, t = data(function, (30, 7), dtype, other)
    for reduction in REDUCTIONS:
        value, of_input, of_target = value_and_grads(getattr(L, function), x, t, reduction=reduction)
        assert (of_input.dtype, of_target.dtype) == (dtype, other)
        exact = value_and_grads(getattr(F, function), x.double(), t.double(), reduction=reduction)
        if fused(function, x, t):
            for got, expected in zip((value, of_input, of_target), exact, strict=True):
                no_less_exact([got], [expected], got.dtype)


@TORCHS
def test_a_tensor_that_is_input_and_target(call):
    function, (x, _), options = made(call, (6, 5), torch.float64)
    x = x.sigmoid()
    ours, torchs = (value_and_grads(lambda x: getattr(f, function)(x, x, **options), x) for f in (L, F))  # noqa: B023
    same(ours, torchs)


@pytest.mark.parametrize("which", ["input", "target", "weight"])
@ALL
def test_changing_a_saved_tensor_before_a_second_backward_is_noticed(call, which):
    function, (x, t), options = made(call, (6, 5), torch.float32)
    leaf = x.clone().requires_grad_()
    x = leaf * 1
    loss = getattr(L, function)(x, t, **options)
    loss.sum().backward(retain_graph=True)  # after which nothing is left of what forward made
    changed = {"input": [x], "target": [t], "weight": [v for v in options.values() if isinstance(v, Tensor)]}[which]
    if not changed:
        pytest.skip("this call has no weight")
    with torch.no_grad():
        changed[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# ---- what is kept for backward


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@ALL
def test_hooks_see_the_inputs_and_nothing_else_is_kept(call, reduction):
    function, (x, t), options = made(call, (6, 5), torch.float32)
    leaf = x.clone().requires_grad_()
    loss = getattr(L, function)(leaf, t, **options, reduction=reduction)
    (expected,) = torch.autograd.grad(loss, leaf)
    given = {each.data_ptr() for each in (leaf, t, *options.values()) if isinstance(each, Tensor)}
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Recorder() as recorder:
        loss = getattr(L, function)(leaf, t, **options, reduction=reduction)
    assert not any("with_grad" in op for op in recorder.seen)
    # A mean by weights divides by a sum of its own.
    kept = [tensor for tensor in seen if tensor.numel() > 1]
    assert kept and all(tensor.data_ptr() in given for tensor in kept)
    same(torch.autograd.grad(loss, leaf)[0], expected)


@needs_extension
@on_cpu_alone("counts the CPU's allocations")
@ALL
def test_a_checkpointed_loss_keeps_nothing(call):
    function, (x, t), options = made(call, (40, 500), torch.float32)
    leaf = x.clone().requires_grad_()
    run = lambda x: getattr(L, function)(x, t, **options, reduction="sum")  # noqa: E731
    expected = value_and_grads(run, x)
    losses: list[Tensor] = []
    assert bytes_kept(lambda: losses.append(checkpoint(run, leaf, use_reentrant=False))) < x.nbytes / 10
    (grad,) = torch.autograd.grad(losses[0], leaf, upstream_of(losses[0]))
    same([losses[0].detach(), grad], expected)


@EVERY_DTYPE
@ALL
def test_the_same_bits_twice(call, dtype):
    function, (x, t), options = made(call, (3, 4, 5, 6), dtype)
    leaves = [x, t] if "focal" not in call else [x]
    for layout, reduction in itertools.product(("contiguous", "sliced"), ("mean", "sum")):
        leaves[0] = laid_out(x, layout).detach()
        for leaf in leaves:
            leaf.requires_grad_()
        for upstream in (1.0, 0.3, 2.0, -0.3, 0.0, 3e4):
            loss = getattr(L, function)(leaves[0], t, **options, reduction=reduction)
            given = torch.full_like(loss, upstream)
            first = [each.clone() for each in torch.autograd.grad(loss, leaves, given, retain_graph=True)]
            torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.7), retain_graph=True)
            second = torch.autograd.grad(loss, leaves, given)
            assert all(torch.equal(*each) for each in zip(first, second, strict=True)), (layout, reduction, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@ALL
def test_an_upstream_gradient_reaches_what_forward_made(call, dtype):
    function, tensors, options = made(call, (7, 6), dtype)
    tensors = tensors[:1] if "focal" in call else tensors
    t = made(call, (7, 6), dtype)[1][1]

    def grads(
        run: Callable[..., Tensor], given: list[Tensor], target: Tensor, options: dict[str, Any], upstream: float
    ) -> Any:
        leaves = [each.detach().clone().requires_grad_() for each in given]
        loss = run(*(leaves if len(leaves) > 1 else (leaves[0], target)), **options, reduction="mean")
        # Through a product, as a loss scale or a sum of weighted losses has it.
        return torch.autograd.grad(loss * upstream, leaves)

    exact_options = as_double(options)
    # The product rounds its factor to bfloat16.
    eps = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 64 * torch.finfo(dtype).eps
    for upstream in (0.3, -2.0, 0.0, 65536.0, 1e-3):
        got = grads(getattr(L, function), tensors, t, options, upstream)
        exact = grads(of_torch(function), [each.double() for each in tensors], t.double(), exact_options, upstream)
        for one, other in zip(got, exact, strict=True):
            same(one.double(), other, rtol=eps, atol=eps * abs(upstream) / 100)


# ---- derivatives


@EVERY_REDUCTION
@TORCHS
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_gradcheck_and_gradgradcheck(call, reduction):
    function, tensors, options = made(call, (2, 2), torch.float64)
    leaves = [each.requires_grad_() for each in tensors]
    run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)
    assert gradcheck(lambda t: run(tensors[0].detach(), t), leaves[1:])
    if function in ("smooth_l1_loss", "huber_loss", "mse_loss", "l1_loss"):
        assert gradgradcheck(lambda t: run(tensors[0].detach(), t), leaves[1:])


@pytest.mark.parametrize("sizes", [((3, 1), (2,)), ((), (3,)), ((2, 3), ())], ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_gradcheck_of_what_broadcasts(function, sizes):
    leaves = [random(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    for options in ({}, {"weight": elements(sizes[0], torch.float64)} if function in WEIGHTED else {}):
        for reduction in REDUCTIONS:
            run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: B023, E731
            assert gradcheck(run, leaves)
            assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("size", [(), (3,), (2, 1), (2, 3)], ids=str)
@EVERY_REDUCTION
def test_gradcheck_with_a_pos_weight(size, reduction):
    x, t = (each.requires_grad_() for each in data(BINARY[1], (2, 3), torch.float64))
    options = {"weight": elements((3,), torch.float64), "pos_weight": elements(size, torch.float64)}
    run = lambda x, t: L.binary_cross_entropy_with_logits(x, t, **options, reduction=reduction)  # noqa: E731
    assert gradcheck(run, (x, t))
    assert gradgradcheck(run, (x, t))


@EVERY_HALF
@pytest.mark.parametrize("call", ["mse", "smooth l1", "logits, pos_weight", "focal"])
def test_a_double_backward_of_several_dtypes(call, dtype):
    function, (x, t), options = made(call, (4, 3), dtype, torch.float32)
    seconds = []
    for run, other in ((getattr(L, function), torch.float32), (of_torch(function), torch.float64)):
        leaf = x.detach().to(dtype if other == torch.float32 else other).requires_grad_()
        given = options if other == torch.float32 else as_double(options)
        value = run(leaf, t.to(other), **given, reduction="sum")
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert seconds[0].dtype == dtype
    same(seconds[0].double(), seconds[1], rtol=0.03, atol=0.03)
