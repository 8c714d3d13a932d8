"""Compiled autograd: the backward of an eager loss in one graph, with eager's gradients."""

import pytest
import torch
from losses import each_of, loss_named

import fusedloss.functional as L


def captured(backward):
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        backward()


@pytest.mark.thinned(1, deep=1)
@each_of([loss_named(name) for name in ("cross_entropy", "huber delta=1.0", "nll", "log_probs 0.7, 0.0")])
@pytest.mark.parametrize("reduction, scale", [("mean", 1.0), ("sum", 3.0), ("none", 1.0)])
def test_gradients_are_those_of_eager(loss, reduction, scale, dtype=torch.float32):
    torch._dynamo.reset()
    x, target = loss.data((6, 5), dtype)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss.fused(leaf, target, reduction).sum() * scale, leaf)
    value = loss.fused(leaf, target, reduction).sum() * scale
    for _ in range(2):  # a graph that runs again must not find its gradient scaled already
        leaf.grad = None
        captured(lambda: value.backward(retain_graph=True))
        torch.testing.assert_close(leaf.grad, expected)


def test_a_bfloat16_gradient_asks_for_no_number_of_its_upstream_one():
    x, y = torch.randn(6, 5).bfloat16().requires_grad_(), torch.randint(5, (6,))
    (expected,) = torch.autograd.grad(L.cross_entropy(x, y) * 3, x)
    captured(lambda: (L.cross_entropy(x, y) * 3).backward())
    assert torch.equal(x.grad, expected)


def test_each_call_keeps_its_own_parameters():
    torch._dynamo.reset()
    x, t = 3 * torch.randn(6, 5), torch.randn(6, 5)
    for delta in (0.5, 1.0, 2.0):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(L.huber_loss(leaf, t, delta=delta), leaf)
        captured(lambda: L.huber_loss(leaf, t, delta=delta).backward())  # noqa: B023
        torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("function", [L.huber_loss, L.cross_entropy])
def test_a_second_backward_is_that_of_eager(function):
    x, t = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5).softmax(1)
    (grad,) = torch.autograd.grad(function(x, t), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        grad.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("function", [L.huber_loss, L.cross_entropy])
def test_hooks_run_in_the_graph(function):
    torch._dynamo.reset()
    x, t = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5).softmax(1)
    (expected,) = torch.autograd.grad(function(x, t), x)
    value = function(x, t)
    value.grad_fn.register_prehook(lambda upstreams: (upstreams[0] * 2,))
    value.grad_fn.register_hook(lambda grads, _: tuple(g if g is None else g * 3 for g in grads))
    captured(value.backward)
    torch.testing.assert_close(x.grad, 6 * expected)


def test_what_hooks_packed_is_unpacked_in_the_graph():
    torch._dynamo.reset()
    x, t = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    (expected,) = torch.autograd.grad(L.huber_loss(2 * x, 2 * t), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor / 2, lambda tensor: tensor * 4):
        value = L.huber_loss(x, t)
    captured((2 * value).backward)
    torch.testing.assert_close(x.grad, expected)


def test_equal_calls_share_a_graph():
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["compiled_autograd"]
    x, t = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    before = counted["captures"]
    for delta in (1.0, 1.0, 2.0, 2.0):
        x.grad = None
        captured(lambda: L.huber_loss(x, t, delta=delta).backward())  # noqa: B023
    assert counted["captures"] - before == 2


def test_a_freed_graph_is_refused():
    torch._dynamo.reset()
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    value = L.cross_entropy(x, y)
    value.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        captured(value.backward)
