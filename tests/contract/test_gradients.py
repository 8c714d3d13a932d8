"""gradcheck and gradgradcheck of every loss, and the rules of autograd around them."""

import pytest
import torch
from compare import value_and_grad
from losses import CROSS_ENTROPY, LOSSES, ONE_OF_EACH, REDUCTIONS, SOFTMAX, each_of
from marks import needs_extension, on_cpu_alone
from observe import peak_bytes
from torch.autograd import gradcheck, gradgradcheck

import fusedloss.functional as L

pytestmark = pytest.mark.filterwarnings("ignore:Input #0 requires gradient")


LINEAR = ("nll", "l1", "hinge_embedding", "kl_div", "margin_ranking")  # in pieces


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(LOSSES)
def test_gradcheck_and_gradgradcheck(loss, reduction):
    for shape in [(5, 4), (3, 4, 2)] if loss in SOFTMAX else [(7,), (2, 3)]:
        x, target = loss.data(shape, torch.float64, seed=2)
        x.requires_grad_()
        assert gradcheck(lambda x: loss.fused(x, target, reduction), x)  # noqa: B023
        assert gradgradcheck(lambda x: loss.fused(x, target, reduction), x)  # noqa: B023


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_with_weights_and_targets(reduction):
    x, t = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    weight = torch.rand(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x, t: L.huber_loss(x, t, reduction, 0.5, weight), (x, t))
    assert gradgradcheck(lambda x, t: L.huber_loss(x, t, reduction, 0.5, weight), (x, t))
    y, classes = torch.tensor([0, 3, -100]), torch.rand(4, dtype=torch.float64)
    for function in (L.cross_entropy, L.focal_loss):
        assert gradcheck(lambda x: function(x, y, classes, reduction=reduction), x)  # noqa: B023
        assert gradgradcheck(lambda x: function(x, y, classes, reduction=reduction), x)  # noqa: B023


@each_of([loss for loss in ONE_OF_EACH if loss.op not in LINEAR])
def test_a_double_backward_carries_a_graph(loss):
    x, target = loss.data((6, 5), torch.float64, seed=2)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss.fused(x, target, "mean"), x, create_graph=True)
    (expected,) = torch.autograd.grad(loss.native(x, target, "mean"), x, create_graph=True)
    assert grad.requires_grad and grad.grad_fn is not None
    (second,) = torch.autograd.grad((grad**2).sum(), x, create_graph=True)
    (expected_second,) = torch.autograd.grad((expected**2).sum(), x, create_graph=True)
    torch.testing.assert_close(second, expected_second)
    (third,) = torch.autograd.grad(second.sum(), x)
    torch.testing.assert_close(third, torch.autograd.grad(expected_second.sum(), x)[0])


@each_of(SOFTMAX)
def test_a_double_backward_of_channels_last(loss):
    x, target = loss.data((2, 5, 3, 4), torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(loss.fused(x, target, "mean"), x, create_graph=True)
    (expected,) = torch.autograd.grad(loss.fused(x.contiguous(), target, "mean"), x, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(grad.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )


def test_a_target_computed_from_the_input_is_not_counted_twice():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: L.huber_loss(x, x**2), x)
    assert gradgradcheck(lambda x: L.huber_loss(x, x**2), x)


@each_of(ONE_OF_EACH)
def test_retain_graph_gives_the_same_gradient_twice(loss):
    x, target = loss.data((6, 5), torch.float32)
    x.requires_grad_()
    value = loss.fused(x, target, "mean")
    first = torch.autograd.grad(value, x, torch.tensor(2.0), retain_graph=True)[0]
    second = torch.autograd.grad(value, x, torch.tensor(2.0))[0]
    assert torch.equal(first, second)


@needs_extension
@each_of([loss for loss in ONE_OF_EACH if loss.family == "pointwise"] + [CROSS_ENTROPY])
def test_compiled_autograd_leaves_the_gradient_of_forward_as_it_is(loss):
    from torch._dynamo import compiled_autograd

    x, target = loss.data((6, 5), torch.float64)
    value = loss.fused(x.requires_grad_(), target, "mean")
    upstream = torch.tensor(3.0, dtype=torch.float64)
    with compiled_autograd._enable(lambda graph: graph):
        (first,) = torch.autograd.grad(value, x, upstream, retain_graph=True)
        first = first.clone()
        (second,) = torch.autograd.grad(value, x, upstream, retain_graph=True)
    assert torch.equal(first, second)
    assert torch.equal(first, torch.autograd.grad(value, x, upstream)[0])


@each_of(ONE_OF_EACH)
def test_an_upstream_gradient_may_be_expanded_or_strided(loss):
    x, target = loss.data((6, 5, 4), torch.float64)
    shape = loss.losses_shape(x.shape)
    for upstream in (
        torch.tensor(3.0).expand(shape),
        torch.rand(shape[::-1]).permute(*range(len(shape))[::-1]),
    ):
        _, grad, _ = value_and_grad(loss.fused, x, target, "none", upstream)
        _, expected, _ = value_and_grad(loss.native, x, target, "none", upstream)
        torch.testing.assert_close(grad, expected)


@each_of(ONE_OF_EACH)
def test_no_graph_is_made_where_none_is_wanted(loss):
    x, target = loss.data((6, 5), torch.float32)
    assert loss.fused(x, target, "mean").grad_fn is None
    with torch.no_grad():
        assert loss.fused(x.requires_grad_(), target, "mean").grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(loss.fused(x, target, "mean"), loss.native(x, target, "mean"))


@each_of(ONE_OF_EACH)
def test_inputs_are_never_written(loss):
    x, target = loss.data((40, 30), torch.float32)
    before, target_before = x.clone(), target.clone()
    x.requires_grad_()
    loss.fused(x, target, "mean").backward()
    assert torch.equal(x, before) and torch.equal(target, target_before) and x._version == 0


def test_saved_tensor_hooks_and_checkpoint():
    x, target = CROSS_ENTROPY.data((6, 5), torch.float32)
    x.requires_grad_()
    expected = torch.autograd.grad(L.cross_entropy(x, target), x)[0]
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(torch.autograd.grad(L.cross_entropy(x, target), x)[0], expected)
    value = torch.utils.checkpoint.checkpoint(L.cross_entropy, x, target, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, x)[0], expected)


def test_scaled_fp16_gradients_do_not_underflow():
    # A mean over 2^20 elements: the unscaled gradient is below the smallest fp16, the scaled one is not.
    x = torch.full((1 << 20,), 0.01, dtype=torch.float16, requires_grad=True)
    target = torch.zeros_like(x)
    (L.huber_loss(x, target).float() * 32768).backward()
    expected = x.detach().float() * 32768 / (1 << 20)
    torch.testing.assert_close(x.grad.float(), expected, rtol=2**-10, atol=0)


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
def test_memory_is_the_gradient_and_a_few_bytes_a_row():
    x, target = CROSS_ENTROPY.data((512, 8000), torch.float32)
    x.requires_grad_()
    peak = peak_bytes(lambda: torch.autograd.grad(CROSS_ENTROPY.fused(x, target, "mean"), x))
    assert x.nbytes <= peak <= 1.05 * x.nbytes
