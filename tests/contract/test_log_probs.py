"""`log_probs`: the target's log-probability at a temperature and the entropy of the row, from the logits alone."""

import math

import pytest
import torch
from compare import assert_close, class_dim, upstreams
from losses import DTYPES, HALVES
from marks import needs_extension, on_cpu_alone
from observe import Recorder, bytes_allocated, compiled_with_ops, holds
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusedloss.functional as L

# (2, 131_100) is cut into parts of a row, (300, 10) goes by columns, and (4, 150, 3) has its classes apart.
SHAPES = [(6, 5), (4, 150, 3), (9,), (2, 131_100), (300, 10), (7, 200)]


def data(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    dim = min(len(shape) - 1, 1)
    target = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator, device="cpu")
    if target.numel() > 1:
        target.view(-1)[1::4] = -100
    return x.to(device, dtype), target.to(device)


def formula(x: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy in plain float64; 0 where ignored."""
    z, dim = x.double() / temperature, class_dim(x)
    kept = target != ignore_index
    log_p = z - z.logsumexp(dim, keepdim=True)
    picked = log_p.gather(dim, (target.long() * kept).unsqueeze(dim)).squeeze(dim)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim)
    return picked.where(kept, 0.0), entropy.where(kept, 0.0)


@pytest.mark.thinned
@pytest.mark.parametrize("temperature", [1.0, 0.7, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_against_float64(shape, dtype, temperature):
    x, target = data(shape, dtype)
    leaf, exact_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
    exact = formula(exact_leaf, target, temperature)
    results = L.log_probs(leaf, target, temperature=temperature, return_entropy=True)
    alone = L.log_probs(leaf, target, temperature=temperature)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(alone, results[0])
    for each in (*results, alone):
        assert each.dtype == (torch.float32 if dtype in HALVES else dtype) and each.shape == target.shape
    for got, expected in zip(results, exact, strict=True):
        assert_close(got.detach(), expected.detach(), 64)
    # One rounding in half types; sums of 131,100 terms here and in the formula otherwise.
    steps = 1.02 if dtype in HALVES else 200
    # Both results, either of them in a backward of its own, and the log-probabilities where no entropy was asked for.
    for chosen, expected in (
        (results, exact),
        (results[:1], exact[:1]),
        (results[1:], exact[1:]),
        ((alone,), exact[:1]),
    ):
        (grad,) = torch.autograd.grad(chosen, leaf, upstreams(*chosen), retain_graph=True)
        (exact_grad,) = torch.autograd.grad(expected, exact_leaf, upstreams(*expected), retain_graph=True)
        assert grad.dtype == dtype
        assert_close(grad, exact_grad, steps)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_runs_fused_and_nothing_else_runs(shape, entropy, dtype):
    x, target = data(shape, dtype)
    for each in (x, x.clone().requires_grad_()):
        with Recorder() as recorder:
            L.log_probs(each, target, temperature=0.7, return_entropy=entropy)
        assert recorder.seen == ["fusedloss.log_probs.default" if entropy else "fusedloss.log_probs.without_second"]


@pytest.mark.parametrize("shape", [(6, 5), (6, 200), (4, 7, 50)], ids=str)
def test_bytes_and_other_ignored_indices(shape):
    x, target = data(shape, torch.float32)
    for ignore_index in (2, -100):
        each = target.where(target >= 0, ignore_index)
        expected = formula(x, each, ignore_index=ignore_index)
        for targets in (each, each.byte()) if ignore_index > 0 else (each,):
            results = L.log_probs(x, targets, ignore_index=ignore_index, return_entropy=True)
            for got, exact in zip(results, expected, strict=True):
                assert_close(got, exact, 48)
                assert (got[each == ignore_index] == 0).all()
    assert (expected[1][target >= 0] > 0).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 200), (4, 7, 50)], ids=str)
def test_ignored_rows_may_hold_anything_and_get_no_gradient(shape):
    x, target = data(shape, torch.float32)
    ignored = (target == -100).unsqueeze(1).expand_as(x)
    x = x.masked_fill(ignored, math.nan).requires_grad_()
    results = L.log_probs(x, target, return_entropy=True)
    (grad,) = torch.autograd.grad(results, x, upstreams(*results))
    assert all(each.isfinite().all() and (each[target == -100] == 0).all() for each in results)
    assert grad.isfinite().all() and (grad[ignored] == 0).all()


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (4,)], ids=str)
def test_gradcheck_and_gradgradcheck(shape):
    x, target = data(shape, torch.float64)
    x.requires_grad_()
    for index in (0, 1, slice(None)):
        call = lambda x: L.log_probs(x, target, temperature=0.7, return_entropy=True)[index]  # noqa: B023, E731
        assert gradcheck(call, x)
        assert gradgradcheck(call, x)
    assert gradgradcheck(lambda x: L.log_probs(x, target, temperature=0.7), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 8), (6, 300), (4, 150, 3), (2, 131_100)], ids=str)
def test_masked_classes_leave_the_entropy_of_the_others(shape, dtype):
    x, target = data(shape, dtype)
    target = torch.where(target < 0, target, target // 2 * 2)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[:, 1::2] = True
    x = x.masked_fill(masked, -math.inf)
    exact_x = x[:, ::2].double().requires_grad_()
    exact = formula(exact_x, torch.where(target < 0, target, target // 2), 0.7)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, upstreams(*exact))
    x.requires_grad_()
    results = L.log_probs(x, target, temperature=0.7, return_entropy=True)
    for got, expected in zip(results, exact, strict=True):
        assert_close(got.detach(), expected.detach(), 48)
    (grad,) = torch.autograd.grad(results, x, upstreams(*results))
    assert (grad[masked] == 0).all()
    assert_close(grad[:, ::2], exact_grad, 1.02 if dtype in HALVES else 48)


@pytest.mark.parametrize("shape", [(3, 2), (3, 200), (3, 9000), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("gap", [5, 20, 60, 80])
def test_confident_rows_keep_their_digits(gap, shape):
    x = torch.zeros(shape)
    x[:, 1] = gap
    x.requires_grad_()
    others = shape[1] - 1
    log_p, entropy = L.log_probs(x, torch.ones(shape[:1] + shape[2:], dtype=torch.long), return_entropy=True)
    # With u = (C - 1) e^-gap: log p = -log(1 + u), and H = log(1 + u) + gap u / (1 + u).
    u = torch.tensor(others * math.exp(-gap), dtype=torch.float64)
    for got, expected in ((log_p, -u.log1p()), (entropy, u.log1p() + gap * u / (1 + u))):
        torch.testing.assert_close(got.double(), expected.expand(got.shape), rtol=3e-5, atol=0)
    (grad,) = torch.autograd.grad(log_p.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad[:, 1].double(), (u / (1 + u)).expand(grad[:, 1].shape), rtol=3e-5, atol=0)
    # Of the entropy: -p (log p + H), of which the target's p is all but 1.
    p, of_others = 1 / (1 + u), math.exp(-gap) / (1 + u)
    (grad,) = torch.autograd.grad(entropy.sum(), x)
    of_target = -p * u / (1 + u) * gap  # log p + H = gap u / (1 + u)
    torch.testing.assert_close(grad[:, 1].double(), of_target.expand(grad[:, 1].shape), rtol=3e-5, atol=0)
    of_other = of_others * (gap - gap * u / (1 + u))
    torch.testing.assert_close(grad[:, 0].double(), of_other.expand(grad[:, 0].shape), rtol=3e-5, atol=0)


def test_a_temperature_divides_whatever_it_is():
    x, target = data((6, 5), torch.float64)
    for temperature in (1e-3, 1, 2, 1e3):
        torch.testing.assert_close(L.log_probs(x, target, temperature=temperature), formula(x, target, temperature)[0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_rejected(temperature):
    x, target = data((6, 5), torch.float32)
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        L.log_probs(x, target, temperature=temperature)


@on_cpu_alone("a GPU tells of a bad target at the next call: test_gpu.py::test_a_bad_target_in_mid_training")
@pytest.mark.parametrize("shape", [(6, 5), (6, 200), (2, 131_100), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("bad", ["the number of classes", -1])
def test_a_target_out_of_range_is_rejected(shape, bad):
    x, target = data(shape, torch.float32)
    number = bad if isinstance(bad, int) else shape[1]
    target.view(-1)[-1] = number
    for entropy in (False, True):
        with pytest.raises(IndexError, match=f"Target {number} is out of bounds."):
            L.log_probs(x, target, return_entropy=entropy)


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_no_log_softmax_is_in_memory(entropy, dtype):
    x, target = data((64, 8000), dtype)

    def train() -> None:
        results = L.log_probs(x.requires_grad_(), target, temperature=0.7, return_entropy=entropy)
        results = results if entropy else (results,)
        torch.autograd.grad([each.sum() for each in results], x)

    for_rows = 64 * 64
    assert bytes_allocated(lambda: L.log_probs(x, target, temperature=0.7, return_entropy=entropy)) < for_rows
    gradient = x.numel() * x.element_size()
    assert gradient <= bytes_allocated(train) < gradient + for_rows


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_compile_keeps_the_fused_op(entropy, dtype):
    x, target = data((6, 5), dtype)
    compiled, graphs = compiled_with_ops(L.log_probs)
    found = []
    for function in (compiled, L.log_probs):
        leaf = x.clone().requires_grad_()
        results = function(leaf, target, temperature=0.7, return_entropy=entropy)
        results = results if entropy else (results,)
        found.append((*results, *torch.autograd.grad(results, leaf, upstreams(*results))))
    torch.testing.assert_close(*found)
    assert holds(graphs, "log_probs") and holds(graphs, "log_probs_backward")
    assert not any("log_softmax" in each for each in graphs)
