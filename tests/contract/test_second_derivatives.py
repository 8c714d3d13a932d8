"""Second derivatives in closed form: torch's own, by input, target and upstream gradient."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import DTYPES, HALVES, NATIVE, REDUCTIONS
from marks import needs_extension
from pointwise_calls import OF_DIFFERENCE, OF_TORCH, as_double, made, random
from torch import Tensor

import fusedloss.functional as L
from fusedloss._library import extension

PROBABILITIES = "cross_entropy of probabilities"
OPS = {
    "mse_loss": "mse", "l1_loss": "l1", "smooth_l1_loss": "smooth_l1", "huber_loss": "huber", "nll_loss": "nll",
    PROBABILITIES: "soft_cross_entropy",
}  # fmt: skip
SOFTMAX: list[tuple[str, dict[str, Any]]] = [
    ("nll_loss", {}),
    ("nll_loss", {"weight": None}),
    ("cross_entropy", {}),
    ("cross_entropy", {"weight": None}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("cross_entropy", {"weight": None, "label_smoothing": 0.1}),
    ("cross_entropy", {"weight": None, "z_loss": 0.1}),
    (PROBABILITIES, {"weight": None, "label_smoothing": 0.1}),
    (PROBABILITIES, {"z_loss": 0.1}),
]
CASES = [("pointwise", call, {}) for call in OF_TORCH] + [("softmax", *each) for each in SOFTMAX]
EACH = pytest.mark.parametrize("case", CASES, ids=[" ".join([call, *options]).strip() for _, call, options in CASES])


def of_z_loss(x, t, weight=None, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    op = "cross_entropy" if t.dtype == torch.int64 else "soft_cross_entropy"
    return NATIVE[op](x, t, weight, reduction, -100, label_smoothing, z_loss, 0.0)


def called(case, dtype, shape=(6, 5)):
    """Our function, torch's, the input and target, and the options."""
    family, call, options = case
    if family == "pointwise":
        function, tensors, options = made(call, shape, dtype)
        return getattr(L, function), getattr(F, function), tensors, options
    dim = min(1, len(shape) - 1)
    x = (2 * random(*shape, seed=1)).to(dtype)
    options = {name: random(shape[dim]).abs().to(dtype) if name == "weight" else of for name, of in options.items()}
    if call == PROBABILITIES:
        target = random(*shape, seed=2).softmax(dim).to(dtype)
    else:
        target = random(*shape, seed=2).argmax(dim)
        if target.dim():
            target.view(-1)[1] = -100
    function = "cross_entropy" if call == PROBABILITIES else call
    theirs = of_z_loss if "z_loss" in options else getattr(F, function)
    return getattr(L, function), theirs, [x, target], options


def seconds(loss, leaves, options, reduction, of_upstream, target=None, higher=False):
    """What a second backward gives for all leaves, and for the upstream gradient if it is one of them."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves, *([] if target is None else [target]), **options, reduction=reduction)
    upstream = torch.full_like(value, 1.5).requires_grad_(of_upstream)
    gradients = torch.autograd.grad(value, leaves, upstream, create_graph=True)
    if of_upstream:
        leaves.append(upstream)
    vs = [random(*gradient.shape, seed=7 + i).to(gradient.dtype) for i, gradient in enumerate(gradients)]
    found = torch.autograd.grad(gradients, leaves, vs, create_graph=higher, retain_graph=True)
    if not higher:
        again = torch.autograd.grad(gradients, leaves, vs)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
        return [*gradients, *found]
    graphs = [each.square().sum() for each in found if each.requires_grad]
    return [*gradients, *found, *torch.autograd.grad(graphs, leaves, allow_unused=True)]


def compare(got, expected, dtype):
    eps = max(torch.finfo(dtype).eps, 1e-11)  # torch adds 1e-12 to probabilities
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == dtype
            scale = 1 + float(other.abs().max())
            torch.testing.assert_close(one.double(), other.double(), rtol=8 * eps, atol=64 * eps * scale)


def of_op(case):
    family, call, _ = case
    function = made(call, (1, 1), torch.float64)[0] if family == "pointwise" else call
    return OPS.get(function, function)


@contextmanager
def without_formula(op: str) -> Iterator[None]:
    """Fails where the native formula of a loss runs."""

    def fails(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the native formula ran")

    known = extension.losses[op]
    formula = known.native
    known.native = fails
    try:
        yield
    finally:
        known.native = formula


@needs_extension
@EACH
def test_they_are_torchs_and_take_no_formula(case):
    for dtype, reduction, of_upstream in itertools.product(DTYPES, REDUCTIONS, (False, True)):
        ours, theirs, (x, t), options = called(case, dtype)
        exact = as_double(options)
        t_exact = t.double() if t.is_floating_point() else t
        expected = seconds(theirs, [x.double()], exact, reduction, of_upstream, t_exact)
        with without_formula(of_op(case)):
            compare(seconds(ours, [x], options, reduction, of_upstream, t), expected, dtype)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("case", CASES[-len(SOFTMAX) :], ids=str)
def test_of_rows_of_every_shape(case, shape):
    ours, theirs, (x, t), options = called(case, torch.float64, shape)
    before = [each.clone() for each in (x, *options.values()) if isinstance(each, Tensor)]
    for reduction in REDUCTIONS:
        expected = seconds(theirs, [x], options, reduction, True, t)
        compare(seconds(ours, [x], options, reduction, True, t), expected, torch.float64)
    after = [each for each in (x, *options.values()) if isinstance(each, Tensor)]
    assert all(torch.equal(*each) for each in zip(before, after, strict=True))


@pytest.mark.parametrize("call", [call for call in OF_TORCH if made(call, (1,), torch.float64)[0] in OF_DIFFERENCE])
def test_by_the_target_too(call):
    for reduction in REDUCTIONS:
        ours, theirs, tensors, options = called(("pointwise", call, {}), torch.float64)
        expected = seconds(theirs, tensors, options, reduction, True)
        compare(seconds(ours, tensors, options, reduction, True), expected, torch.float64)


@EACH
def test_the_third_derivative(case):
    ours, theirs, (x, t), options = called(case, torch.float64)
    for reduction in ("mean", "none"):
        expected = seconds(theirs, [x], options, reduction, True, t, higher=True)
        compare(seconds(ours, [x], options, reduction, True, t, higher=True), expected, torch.float64)


def test_that_of_a_linear_loss_is_zero_and_has_no_graph():
    for torchs in (L, F):
        x, y = random(6, 5, seed=1).requires_grad_(), random(6, 5, seed=2).argmax(1)
        leaf = x * 1
        (grad,) = torch.autograd.grad(torchs.nll_loss(leaf, y), leaf, create_graph=True)
        leaf.detach().zero_()
        (second,) = torch.autograd.grad(grad.sin().sum(), x, create_graph=True)
        assert grad.requires_grad and not second.requires_grad and not second.any(), torchs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_a_slope_jumps(dtype):
    t = torch.zeros(7, dtype=dtype)
    x = torch.tensor([0.0, -0.5, 0.5, -1.0, 1.0, 2.0, torch.nan], dtype=dtype)
    v = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, torch.inf, 1.0], dtype=dtype)
    calls: list[tuple[str, dict[str, float]]] = [("l1_loss", {}), ("smooth_l1_loss", {"beta": 0.0})]
    calls += [("smooth_l1_loss", {"beta": bound}) for bound in (0.5, 1.0)]
    calls += [("huber_loss", {"delta": bound}) for bound in (0.5, 1.0)]
    for function, options in calls:
        found = []
        for torchs in (L, F):
            leaf = x.clone().requires_grad_()
            value = getattr(torchs, function)(leaf, t, **options, reduction="sum")
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            found.append(torch.autograd.grad(grad, leaf, v)[0])
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_at_the_ends_of_the_probabilities(target):
    found = []
    for torchs in (L, F):
        x = torch.tensor([0.0, 1e-20, 0.5, 1.0], requires_grad=True)
        value = torchs.binary_cross_entropy(x, torch.full_like(x, target), reduction="sum")
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(torch.autograd.grad(grad.sum(), x)[0])
    torch.testing.assert_close(*found)


def test_an_infinite_weight_is_that_of_its_class():
    weight = torch.tensor([torch.inf, 1.0, 2.0])
    x, y = random(4, 3, seed=1).float().requires_grad_(), torch.tensor([1, -100, 2, 1])
    found = []
    for torchs in (L, F):
        (grad,) = torch.autograd.grad(torchs.cross_entropy(x, y, weight, reduction="sum"), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found, equal_nan=True)


@EACH
def test_a_change_of_the_input_is_noticed(case):
    ours, _, (x, t), options = called(case, torch.float32)
    if case[1] == "nll_loss":
        pytest.skip("linear: torch does not read the input again either")
    leaf = x.requires_grad_()
    changed = leaf * 1
    (grad,) = torch.autograd.grad(ours(changed, t, **options), changed, create_graph=True)
    changed.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(grad.sum(), leaf)


@EACH
def test_a_batch_of_them(case):
    ours, _, (x, t), options = called(case, torch.float64)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, t, **options), leaf, create_graph=True)
    vs = random(3, *x.shape, seed=5)
    (batched,) = torch.autograd.grad(grad, leaf, vs, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(grad, leaf, v, retain_graph=True)[0] for v in vs]
    torch.testing.assert_close(batched, torch.stack(each))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_small_gradient_of_a_mean_is_not_lost(dtype):
    # By the upstream gradient, which a loss scale makes: each product over 2^20 elements is below the smallest fp16.
    x = torch.full((1 << 20,), 0.5, dtype=dtype, requires_grad=True)
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(L.mse_loss(x, torch.zeros_like(x)) * scale, x, create_graph=True)
    (second,) = torch.autograd.grad(grad, scale, torch.ones_like(x))
    torch.testing.assert_close(second, torch.ones((), dtype=dtype))
