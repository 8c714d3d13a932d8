"""Linear losses in half precision: autocast, gradient scaling, large factors."""

import linear_calls as calls
import pytest
import torch
import torch.nn.functional as F
from linear_calls import ROUTES, call, doubled, exact_grads, grads, indices, norm_error, operands
from losses import HALVES
from marks import needs_extension
from torch import Tensor

import fusedloss.functional as L

EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)


@pytest.mark.thinned
@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "option", [{}, {"weight": 11}, {"sample_weight": 23}, {"label_smoothing": 0.1}, *list(ROUTES.values())[1:]], ids=str
)
def test_under_autocast_products_are_in_half_precision_and_losses_in_float32(option, dtype, chunk_rows):
    leaves, target = operands(), indices()
    options = {
        name: calls.drawn(value, seed=5).abs().float() if name.endswith("weight") else value
        for name, value in option.items()
    }
    with torch.autocast(target.device.type, dtype):
        results = call(leaves, target, chunk_rows, **options)
        torchs = F.cross_entropy(F.linear(*leaves), target)
    assert all(each.dtype == torchs.dtype == torch.float32 for each in results)
    if not option:
        torch.testing.assert_close(results[0], torchs, rtol=1e-2, atol=1e-2)
    options = {name: each.double() if isinstance(each, Tensor) else each for name, each in options.items()}
    for got, exact in zip(grads(results, leaves), exact_grads(leaves, target, **options), strict=True):
        assert got.dtype == torch.float32
        assert 1e-6 < norm_error(got, exact) < calls.WITHIN[dtype]  # not made in float32


@needs_extension
@EACH_ROUTE
def test_a_backward_under_autocast_keeps_its_digits(route):
    leaves, target = operands(), indices()
    results = call(leaves, target, **ROUTES[route])
    with torch.autocast(target.device.type, torch.bfloat16):
        got = grads(results, leaves)
    for each, exact in zip(got, exact_grads(leaves, target, **ROUTES[route]), strict=True):
        assert norm_error(each, exact) < 1e-5


@needs_extension
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 70, 1000])
@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**16])
def test_the_upstream_gradient_of_a_gradient_scaler(scale, chunk_rows, dtype):
    leaves, target = operands((1000,), dtype, classes=300), indices((1000,), classes=300)
    (loss,) = call(leaves, target, chunk_rows, out_dtype=torch.float32)
    got = torch.autograd.grad(loss, leaves, torch.tensor(scale))
    exact_leaves = doubled(leaves)
    exact = calls.cross_entropy(calls.logits(*exact_leaves), target)[0]
    expected = torch.autograd.grad(exact, exact_leaves, torch.tensor(scale, dtype=torch.float64))
    for each, other in zip(got, expected, strict=True):
        # What float16 cannot hold at this scale is lost to everyone.
        least = torch.finfo(dtype).smallest_normal
        assert each.isfinite().all()
        assert norm_error(each, other) < calls.WITHIN[dtype] + least / other.abs().max().item()


@needs_extension
@pytest.mark.parametrize("chunk_rows", [5, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("large", ["weight", "sample_weight", "z_loss", "alpha", "of rows with alpha"])
def test_large_factors_in_float16_do_not_overflow(large, reduction, chunk_rows):
    leaves, target = operands(dtype=torch.float16), indices()
    exact_leaves = doubled(leaves)
    z, rows = calls.logits(*exact_leaves), torch.full((23,), 1000.0)
    more = {"linear_bias": leaves[2], "reduction": reduction, "chunk_rows": chunk_rows}
    if large.endswith("alpha"):
        of_rows = {"sample_weight": rows} if large.startswith("of") else {}
        loss = L.linear_focal_loss(
            *leaves[:2], target, 500.0, **{name: each.half() for name, each in of_rows.items()}, **more
        )
        exact = calls.focal_loss(z, target, 500.0, reduction=reduction, **of_rows)
    else:
        factor = {"weight": torch.full((11,), 1000.0), "sample_weight": rows, "z_loss": 50.0}[large]
        given = factor.half() if isinstance(factor, Tensor) else factor
        loss = L.linear_cross_entropy(*leaves[:2], target, **{large: given}, **more)
        factor = factor.double() if isinstance(factor, Tensor) else factor
        exact = calls.cross_entropy(z, target, reduction=reduction, **{large: factor})[0]
    upstream = torch.tensor(2.0**-8)  # so that the gradients themselves are in range
    got = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    for each, other in zip(got, torch.autograd.grad(exact, exact_leaves, upstream.double()), strict=True):
        assert norm_error(each, other) < calls.WITHIN[torch.float16]


@needs_extension
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_blocks_of_classes_know_every_term_of_the_gradient(positions, reduction, dtype):
    leaves, target = operands(dtype=dtype, positions=positions), indices(positions=positions)
    factors = {
        "weight": calls.drawn(11, seed=5).abs().to(dtype),
        "sample_weight": calls.drawn(*target.shape, seed=6).abs().to(dtype),
    }
    options = {"z_loss": 1.0, "softcap": 3.0, "return_lse": True, "reduction": reduction}
    for more in ({}, factors):
        results = call(leaves, target, chunk_rows=5, **options, **more)
        exact = exact_grads(leaves, target, **options, **{name: each.double() for name, each in more.items()})
        for got, each in zip(grads(results, leaves), exact, strict=True):
            assert norm_error(got, each) < calls.WITHIN[dtype]


@needs_extension
@pytest.mark.parametrize("loss", ["plain", "smoothing", "focal"])
@pytest.mark.parametrize("chunk_rows", [600, 1200])
def test_a_frequent_class_in_float16_does_not_overflow(chunk_rows, loss):
    """A sum over rows of 1 is 1200, and 2**8 times that is more than float16 holds."""
    input, head, bias = (each.detach() for each in operands((1200,), torch.float16))
    leaves = ((input.abs() + 1).requires_grad_(), (head * 100).requires_grad_(), bias.requires_grad_())
    target, exact_leaves = torch.full((1200,), 3), doubled(leaves)
    z = calls.logits(*exact_leaves)
    options = {"linear_bias": leaves[2], "chunk_rows": chunk_rows}
    if loss == "focal":
        value, exact = L.linear_focal_loss(*leaves[:2], target, **options), calls.focal_loss(z, target)
    else:
        smoothing = 0.1 if loss == "smoothing" else 0.0
        value = L.linear_cross_entropy(*leaves[:2], target, label_smoothing=smoothing, **options)
        exact = calls.cross_entropy(z, target, label_smoothing=smoothing)[0]
    for got, each in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(exact, exact_leaves), strict=True):
        assert norm_error(got, each) < 5 * calls.WITHIN[torch.float16]
