"""Inputs that are overwritten between forward and backward: the right gradient, or torch's error, never another one."""

import pytest
import torch
from compare import upstream_of
from losses import DTYPES, HALVES, ONE_OF_EACH, REDUCTIONS, each_of, traits
from marks import needs_extension, on_cpu_alone

CHANGED = "has been modified by an inplace operation"
AGAIN = "Trying to backward through the graph a second time"


def made_in_forward(loss, reduction, dtype):
    """On the CPU, outside saved-tensor hooks."""
    by_row = loss.family == "pointwise" or traits(loss.op).reads_row
    return by_row and reduction != "none" and dtype != torch.float16


def called(loss, dtype, reduction):
    """The leaf, the logits made of it, their target, and the loss."""
    x, target = loss.data((6, 5), dtype)
    x.requires_grad_()
    logits = x * 1
    return x, logits, target, loss.fused(logits, target, reduction)


def power_of_two(value):
    return torch.full_like(value, 0.5)


@pytest.mark.thinned
@pytest.mark.parametrize("what", ["the logits", "the target"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_a_change_gives_no_other_gradient(loss, reduction, dtype, what):
    x, logits, target, value = called(loss, dtype, reduction)
    (expected,) = torch.autograd.grad(value, x, power_of_two(value))
    x, logits, target, value = called(loss, dtype, reduction)
    (logits if what == "the logits" else target).detach().zero_()
    try:
        assert torch.equal(torch.autograd.grad(value, x, power_of_two(value))[0], expected)
    except RuntimeError as error:
        assert CHANGED in str(error)


@needs_extension
@on_cpu_alone("a GPU makes no gradient of rows in forward; test_a_change_gives_no_other_gradient runs there")
@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_a_gradient_of_forward_outlives_the_inputs(loss, reduction, dtype):
    x, logits, target, value = called(loss, dtype, reduction)
    (expected,) = torch.autograd.grad(value, x, power_of_two(value))
    x, logits, target, value = called(loss, dtype, reduction)
    logits.detach().zero_()
    target.zero_()
    if not made_in_forward(loss, reduction, dtype):
        with pytest.raises(RuntimeError, match=CHANGED):
            torch.autograd.grad(value, x, power_of_two(value))
        return
    assert torch.equal(torch.autograd.grad(value, x, power_of_two(value), retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match=CHANGED):  # which makes it again
        torch.autograd.grad(value, x, power_of_two(value))


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of([loss for loss in ONE_OF_EACH if loss.family == "pointwise"])
def test_a_gradient_to_the_target_too(loss, reduction, dtype):
    if not (traits(loss.op).of_difference or traits(loss.op).has_target_slope):
        pytest.skip("the loss has no gradient to its target; the tests above change it")

    def grads(change, *wanted):
        x, target = (each.requires_grad_() for each in loss.data((6, 5), dtype))
        pair = (x * 1, target * 1)
        value = loss.fused(*pair, reduction)
        for each in pair if change else ():
            each.detach().zero_()
        return torch.autograd.grad(value, [(x, target)[i] for i in wanted], power_of_two(value))

    for wanted in [(0, 1), (0,), (1,)]:
        expected = grads(False, *wanted)
        assert all(map(torch.equal, expected, [grads(False, 0, 1)[i] for i in wanted]))
        try:
            assert all(map(torch.equal, grads(True, *wanted), expected))
        except RuntimeError as error:
            assert CHANGED in str(error)


@pytest.mark.parametrize("first", ["backward", "create_graph", "to the target alone"])
@each_of(ONE_OF_EACH)
def test_a_second_backward_without_retain_graph_raises(loss, first):
    x, logits, target, value = called(loss, torch.float32, "mean")
    if first == "to the target alone":
        if not (loss.family == "pointwise" and traits(loss.op).of_difference):
            pytest.skip("the loss has no gradient to its target; the other cases run")
        target.requires_grad_()
        value = loss.fused(logits, target, "mean")
    wanted = target if first == "to the target alone" else x
    torch.autograd.grad(value, wanted, retain_graph=False, create_graph=first == "create_graph", allow_unused=True)
    with pytest.raises(RuntimeError, match=AGAIN):
        torch.autograd.grad(value, logits)


@each_of(ONE_OF_EACH)
def test_a_changed_input_has_no_derivative_of_a_gradient(loss):
    x, logits, target, value = called(loss, torch.float32, "mean")
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(value, x, create_graph=True)


@on_cpu_alone("a GPU does not ask for the number; test_a_change_gives_no_other_gradient runs there")
@each_of([loss for loss in ONE_OF_EACH if loss.op != "nll"])
def test_what_is_rounded_twice_is_made_again(loss):
    x, logits, target, value = called(loss, torch.bfloat16, "mean")
    (expected,) = torch.autograd.grad(value, x, torch.full_like(value, 3), retain_graph=True)
    assert torch.equal(torch.autograd.grad(value, x, torch.full_like(value, 3))[0], expected)
    x, logits, target, value = called(loss, torch.bfloat16, "mean")
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(value, x, torch.full_like(value, 3))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_indices_of_a_pointwise_loss(reduction, dtype):
    import fusedloss.functional as L

    def grad(change):
        x, y = torch.randn(6, 5, generator=torch.Generator("cpu").manual_seed(1), device="cpu"), torch.arange(6)
        x = x.to(torch.get_default_device(), dtype).requires_grad_()
        logits = x * 1
        value = L.sigmoid_focal_loss(logits, y, reduction=reduction, ignore_index=-100)
        if change:
            logits.detach().zero_()
            y.zero_()
        return torch.autograd.grad(value, x, upstream_of(value).fill_(2))[0]

    try:
        assert torch.equal(grad(True), grad(False))
    except RuntimeError as error:
        assert CHANGED in str(error)
