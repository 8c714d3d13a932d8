"""Many upstream gradients in one backward: vectorized jacobians and hessians, is_grads_batched, vmap of a backward."""

import pytest
import torch
from compare import same
from losses import DTYPES, HALVES, ONE_OF_EACH, REDUCTIONS, each_of, traits
from torch.autograd.functional import hessian, jacobian

import fusedloss.functional as L

# torch's own losses fall back to a loop in some of these, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def tolerance(dtype):
    """The native formula rounds to a half type on its way."""
    return {"rtol": 2e-2, "atol": 1e-2} if dtype in HALVES else {}


def tried(run):
    try:
        return run()
    except RuntimeError as error:
        return str(error)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_a_vectorized_jacobian(loss, reduction, dtype):
    x, target = loss.data((4, 5), dtype)
    found = jacobian(lambda x: loss.fused(x, target, reduction), x, vectorize=True)
    same(found, jacobian(lambda x: loss.native(x, target, reduction), x, vectorize=True), **tolerance(dtype))
    same(found, jacobian(lambda x: loss.fused(x, target, reduction), x), **tolerance(dtype))


@pytest.mark.thinned
@pytest.mark.parametrize("transform", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_a_batch_of_upstream_gradients(loss, reduction, dtype, create_graph, transform):
    x, target = loss.data((4, 5), dtype)
    x.requires_grad_()
    value = loss.fused(x, target, reduction)
    upstreams = torch.stack([torch.full_like(value, number) for number in (1, 3, -0.7)])
    options = {"retain_graph": True, "create_graph": create_graph}
    each = [torch.autograd.grad(value, x, one, **options)[0] for one in upstreams]
    if transform == "vmap":
        found = torch.func.vmap(lambda one: torch.autograd.grad(value, x, one, **options)[0])(upstreams)
    else:
        (found,) = torch.autograd.grad(value, x, upstreams, **options, is_grads_batched=True)
    same(found, torch.stack(each), **tolerance(dtype))
    if create_graph and found.requires_grad and dtype not in HALVES:  # whose squares overflow
        same(
            torch.autograd.grad(found.square().sum(), x)[0],
            torch.autograd.grad(sum(one.square().sum() for one in each), x)[0],
            # Two formulas, of which those of binary cross-entropy cancel near 0 and 1.
            **({"rtol": 5e-5, "atol": 1e-5} if dtype == torch.float32 else tolerance(dtype)),
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_gradcheck_of_batched_gradients(loss, reduction):
    x, target = loss.data((3, 4), torch.float64, seed=2)
    run = lambda x: loss.fused(x, target, reduction)  # noqa: E731
    assert torch.autograd.gradcheck(run, x.requires_grad_(), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, x, check_batched_grad=True, fast_mode=True)


@each_of([loss for loss in ONE_OF_EACH if loss.family == "pointwise"])
def test_batches_of_gradients_to_the_target(loss):
    if not (traits(loss.op).of_difference or traits(loss.op).has_target_slope):
        pytest.skip("the loss has no gradient to its target; the tests above batch that to the input")
    pair = loss.data((3, 4), torch.float64)
    for reduction in REDUCTIONS:
        found, exact = (
            jacobian(lambda x, t: run(x, t, reduction), pair, vectorize=True)  # noqa: B023
            for run in (loss.fused, loss.native)
        )
        same(found, exact)


@each_of(ONE_OF_EACH)
def test_a_vectorized_hessian(loss):
    x, target = loss.data((3, 4), torch.float64)
    for outer in ("reverse-mode", "forward-mode"):  # torch has no forward mode of some derivatives
        options = {"vectorize": True, "outer_jacobian_strategy": outer}
        found, exact = (
            tried(lambda: hessian(lambda x: run(x, target, "mean"), x, **options))  # noqa: B023
            for run in (loss.fused, loss.native)
        )
        if outer == "reverse-mode" or isinstance(exact, torch.Tensor):
            same(found, exact)
        else:
            assert found == exact


def test_a_batch_of_both_results():
    x, y = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, -100, 2])
    results = L.cross_entropy(x, y, z_loss=0.1, return_lse=True)
    upstreams = (torch.randn(3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    found = torch.autograd.grad(results, x, upstreams, retain_graph=True, is_grads_batched=True)[0]
    each = [torch.autograd.grad(results, x, both, retain_graph=True)[0] for both in zip(*upstreams, strict=True)]
    same(found, torch.stack(each))
    (found,) = torch.autograd.grad(results[1], x, upstreams[1], retain_graph=True, is_grads_batched=True)
    same(found, torch.stack([torch.autograd.grad(results[1], x, one, retain_graph=True)[0] for one in upstreams[1]]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_indices_of_a_pointwise_loss(reduction):
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, -100, 1])
    run = lambda x: L.sigmoid_focal_loss(x, y, reduction=reduction, ignore_index=-100)  # noqa: E731
    same(jacobian(run, x, vectorize=True), jacobian(run, x))


@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_overwritten_logits_have_room_for_one_gradient(grad_in_forward):
    x = torch.randn(4, 5, requires_grad=True)
    value = L.cross_entropy(x * 1, torch.arange(4), inplace=True, grad_in_forward=grad_in_forward)
    try:
        (found,) = torch.autograd.grad(value, x, torch.ones(2), is_grads_batched=True)
    except RuntimeError as error:
        assert "inplace=True has room for one gradient" in str(error)
    else:  # natively, without an extension
        same(found[0], torch.autograd.grad(L.cross_entropy(x, torch.arange(4)), x)[0])
