"""Transforms of torch.func and forward-mode AD, inside torch.compile and over the ops: never a silent zero."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from losses import ONE_OF_EACH, SOFTMAX, Loss, each_of, loss_named
from marks import needs_extension

TRANSFORMS = {
    "grad": lambda f, x, v: torch.func.grad(f)(x),
    "grad_and_value": lambda f, x, v: torch.func.grad_and_value(f)(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(f)(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(f))(torch.stack([x, v])),
    "a dual tensor": lambda f, x, v: tangent_of(f, x, v),
}


def tangent_of(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def arguments(loss: Loss):
    x, target = loss.data((4, 3), torch.float64)
    tangent = torch.rand_like(x)
    return x, target.clamp_min(0), tangent / tangent.sum(1, keepdim=True) if loss.of_probabilities else tangent


@pytest.mark.thinned(1, deep=1)
@pytest.mark.parametrize("transform", TRANSFORMS)
@each_of(ONE_OF_EACH)
def test_transforms_inside_a_compiled_function(loss, transform):
    x, target, v = arguments(loss)
    run = lambda formula: TRANSFORMS[transform](lambda z: formula(z, target, "mean"), x, v)  # noqa: E731
    torch._dynamo.reset()
    got = torch.compile(lambda: run(loss.fused), backend="aot_eager")()
    torch.testing.assert_close(got, run(loss.native))


@each_of([loss_named("huber delta=1.0"), loss_named("cross_entropy")])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_dual_tensor_handed_to_a_compiled_function(loss, backend):
    x, target, v = arguments(loss)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: loss.fused(z, target, "sum"), backend=backend)
    torch.testing.assert_close(tangent_of(compiled, x, v), tangent_of(lambda z: loss.native(z, target, "sum"), x, v))


# Their backward has no forward-mode derivative in torch.
WITHOUT_TANGENT = ("huber", "smooth_l1", "soft_margin")


@each_of([loss for loss in ONE_OF_EACH if loss.op not in WITHOUT_TANGENT])
def test_an_upstream_gradient_with_a_tangent(loss):
    x, target, v = arguments(loss)

    def tangent(formula):
        leaf = x.clone().requires_grad_()
        value = formula(leaf, target, "none")
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(value), torch.rand_like(value).fill_(0.7))
            return forward_ad.unpack_dual(torch.autograd.grad(value, leaf, upstream)[0]).tangent

    torch.testing.assert_close(tangent(loss.fused), tangent(loss.native))


def op_call(loss: Loss, x, target, reduction: int):
    middle = (-100,) if loss in SOFTMAX else ()
    value = getattr(torch.ops.fusedloss, loss.op)(x, target, None, reduction, *middle, list(loss.params))
    return value[0] if loss in SOFTMAX else value


@needs_extension
@each_of(ONE_OF_EACH)
def test_the_op_itself_under_transforms(loss):
    x, target, v = arguments(loss)
    run = lambda z: op_call(loss, z, target, 1)  # noqa: E731
    native = lambda z: loss.native(z, target, "mean")  # noqa: E731
    transforms = ["grad", "jvp", "hessian", "vmap of grad", "a dual tensor"]
    if loss.op == "soft_margin":  # of which torch has none
        transforms.remove("hessian")
    for transform in transforms:
        torch.testing.assert_close(TRANSFORMS[transform](run, x, v), TRANSFORMS[transform](native, x, v))


@needs_extension
def test_ops_that_autograd_calls_refuse_tangents_and_say_that_they_have_no_derivative():
    x, t, ops = torch.randn(4, 3), torch.randn(4, 3), torch.ops.fusedloss
    one = torch.tensor(1.0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        for call in (
            lambda: ops.mse_backward(one, dual, t, None, 1, []),
            lambda: ops.mse_with_grad(dual, t, None, 1, []),
        ):
            with pytest.raises(NotImplementedError, match="forward AD"):
                call()
        with pytest.raises(RuntimeError, match="scale_ has no derivative"):
            ops.scale_(dual, one)
    gradient = ops.mse_backward(one, x.requires_grad_(), t, None, 1, [])
    with pytest.raises(RuntimeError, match="derivative for fusedloss::mse_backward is not implemented"):
        gradient.sum().backward()
