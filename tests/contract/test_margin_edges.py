"""The losses of margins and of distributions where their formulas change or end."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import same, value_and_grads
from losses import DTYPES
from torch import Tensor

import fusedloss.functional as L

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def losses_and_grads(run, *tensors: Tensor) -> list[Tensor]:
    """With an upstream gradient of 1, so that single numbers can be named."""
    leaves = [each.clone().requires_grad_() for each in tensors]
    value = run(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@EVERY_DTYPE
def test_hinge_at_the_margin_and_of_other_labels(dtype):
    margin = 0.75
    x = torch.tensor([margin, -1.0, 2.0, 0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    for label in (1.0, -1.0, 0.0, 0.5, 2.0, math.nan):
        t = torch.full_like(x, label)
        ours, torchs = (
            losses_and_grads(lambda x: f.hinge_embedding_loss(x, t, margin, reduction="none"), x)  # noqa: B023
            for f in (L, F)
        )
        same(ours, torchs)


@EVERY_DTYPE
def test_hinge_of_any_margin(dtype):
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=dtype)
    t = torch.tensor([-1, -1, 1, -1, 2])
    for margin in (0.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1):
        run = lambda f: losses_and_grads(lambda x: f.hinge_embedding_loss(x, t, margin, reduction="none"), x)  # noqa: B023, E731
        same(run(L), run(F))


@EVERY_DTYPE
def test_soft_margin_is_finite_where_torchs_overflows(dtype):
    x = torch.tensor([1000.0, -1000.0, 20.0, -20.0, 0.0], dtype=dtype)
    t = -torch.ones_like(x)
    value, grad = losses_and_grads(lambda x: L.soft_margin_loss(x, t, reduction="none"), x)
    exact = x.double().clamp_min(0) + (-x.double().abs()).exp().log1p()
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}
    same(value.double(), exact, **tolerance)
    same(grad.double(), x.double().sigmoid(), **tolerance)
    of_torch = losses_and_grads(lambda x: F.soft_margin_loss(x, t, reduction="none"), x)
    assert of_torch[0][0].isinf() and of_torch[1][0].isnan()


@EVERY_DTYPE
def test_soft_margin_keeps_the_digits_of_confident_scores(dtype):
    x = torch.tensor([17.0, 30.0, 60.0], dtype=dtype)
    value, _ = losses_and_grads(lambda x: L.soft_margin_loss(x, torch.ones_like(x), reduction="none"), x)
    exact = (-x.double()).exp().log1p()
    normal = exact > torch.finfo(dtype).smallest_normal
    same(value.double()[normal], exact[normal], rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_soft_margin_of_byte_labels_has_the_gradient_of_other_dtypes():
    # Where torch negates a byte: its gradient is NaN for a label of 1 and a positive score, and 0 for a negative one.
    x, t = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1, 1, 0])
    run = lambda f, t: losses_and_grads(lambda x: f.soft_margin_loss(x, t, reduction="none"), x)  # noqa: E731
    same(run(L, t.byte()), run(F, t))


@EVERY_DTYPE
def test_divergence_of_probabilities_at_and_below_zero(dtype):
    x = torch.tensor([-1.0, -math.inf, -1.0, -1.0, math.nan, -math.inf], dtype=dtype)
    t = torch.tensor([0.0, 0.0, -1.0, math.nan, 0.5, 0.5], dtype=dtype)
    ours, torchs = (losses_and_grads(lambda x: f.kl_div(x, t, reduction="none"), x) for f in (L, F))  # noqa: B023
    same(ours, torchs)  # NaN below 0
    assert ours[0][0] == 0 and ours[1][0] == 0
    (_, _, slope) = losses_and_grads(lambda x, t: L.kl_div(x, t, reduction="none"), x[:1], t[:1])
    assert slope.item() == -math.inf  # the limit, where torch divides 0 by 0
    assert losses_and_grads(lambda x, t: F.kl_div(x, t, reduction="none"), x[:1], t[:1])[2].isnan()


@EVERY_DTYPE
def test_divergence_of_logarithms_of_any_size(dtype):
    x = torch.tensor([-1.0, 0.0, -1.0, 2.0, -1.0, math.nan], dtype=dtype)
    t = torch.tensor([0.0, -math.inf, 2.0, -30.0, math.inf, 0.0], dtype=dtype)
    ours, torchs = (
        losses_and_grads(lambda x, t: f.kl_div(x, t, reduction="none", log_target=True), x, t)  # noqa: B023
        for f in (L, F)
    )
    same(ours, torchs, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_batchmean_divides_by_the_first_dimension():
    x, t = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5, dtype=torch.float64)
    total = L.kl_div(x, t, reduction="sum")
    same(L.kl_div(x, t, reduction="batchmean"), total / 3)
    same(L.kl_div(x[0, 0, 0], t[0, 0, 0], reduction="batchmean"), F.kl_div(x[0, 0, 0], t[0, 0, 0], reduction="sum"))
    # Of the input, whatever the target's size.
    same(*(value_and_grads(f.kl_div, x[:1], t, reduction="batchmean") for f in (L, F)))
    assert L.kl_div(x[:1], t, reduction="batchmean") == L.kl_div(x[:1], t, reduction="sum")


@EVERY_DTYPE
@pytest.mark.parametrize("log_input", [True, False])
def test_stirlings_approximation_begins_above_a_count_of_one(log_input, dtype):
    t = torch.tensor([0.5, 1.0, 1.0078125, 2.0, 100.0, math.nan], dtype=dtype)
    x = torch.ones_like(t)
    run = lambda f, **o: losses_and_grads(  # noqa: E731
        lambda x, t: f.poisson_nll_loss(x, t, log_input, reduction="none", **o), x, t
    )
    ours, torchs = run(L, full=True), run(F, full=True)
    same(ours, torchs, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    bare = run(L)
    assert torch.equal(ours[0][:2], bare[0][:2]) and (ours[0][2:5] != bare[0][2:5]).all()


@pytest.mark.parametrize("log_input", [True, False])
def test_the_slope_of_a_count_of_zero_is_finite(log_input):
    # Where torch multiplies the logarithm of 0 by 0.
    x, t = torch.tensor([0.5, 2.0]), torch.tensor([0.0, -1.0])
    run = lambda f, full: losses_and_grads(  # noqa: E731
        lambda x, t: f.poisson_nll_loss(x, t, log_input, full, reduction="none"), x, t
    )
    same(run(L, True), run(F, False))
    assert run(F, True)[2].isnan().all()


@EVERY_DTYPE
def test_rates_below_eps_are_nan(dtype):
    x = torch.tensor([0.0, -0.25, -0.5, -1.0, 1.0, math.inf, math.nan], dtype=dtype)
    t = torch.tensor([1.0, 2.0, 1.0, 3.0, 0.0, 1.0, 1.0], dtype=dtype)
    ours, torchs = (
        losses_and_grads(lambda x: f.poisson_nll_loss(x, t, False, eps=0.5, reduction="none"), x)  # noqa: B023
        for f in (L, F)
    )
    same(ours, torchs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert ours[0][2].isposinf() and ours[0][3].isnan() and ours[1][3].isfinite()


def test_the_mean_of_many_labels_in_float16_is_right_where_torchs_is_infinite():
    x, t = torch.zeros(2, 200_000, dtype=torch.float16), torch.zeros(2, 200_000, dtype=torch.float16)
    for reduction, rows in (("mean", 1), ("sum", 2), ("none", 1)):
        value = L.multilabel_soft_margin_loss(x, t, reduction=reduction)
        same(value.double(), torch.full(value.shape, rows * math.log(2)).double(), rtol=2e-3, atol=0)
        assert F.multilabel_soft_margin_loss(x, t, reduction=reduction).isinf().all()


def test_labels_of_confident_logits_keep_their_digits():
    x, t = torch.tensor([[-20.0, 20.0]]), torch.tensor([[0.0, 1.0]])
    value = L.multilabel_soft_margin_loss(x, t)
    same(value.double(), torch.tensor(-20.0).double().exp().log1p(), rtol=1e-6, atol=0)
