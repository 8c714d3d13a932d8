"""The gradient that forward makes in a captured graph travels with a small result of forward, and is used once."""

import gc
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from losses import ONE_OF_EACH, SOFTMAX, Loss, each_of
from marks import needs_extension, on_cpu_alone
from observe import ARITHMETIC, compiled_with_ops

pytestmark = [needs_extension, on_cpu_alone("a GPU moves fewer bytes with a backward of its own")]
OPS = torch.ops.fusedloss
CARRYING = [loss for loss in ONE_OF_EACH if loss.op != "nll"]  # the gradient of nll needs no logits
MEAN = 1


class Step:
    """The ops of a captured training step: forward, and backward from what forward left."""

    def __init__(self, loss: Loss, dtype: torch.dtype = torch.float32) -> None:
        self.loss, (self.x, self.target) = loss, loss.data((6, 5), dtype)
        self.middle = (MEAN, *((-100,) if loss in SOFTMAX else ()), list(loss.params))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        value, left = getattr(OPS, self.loss.op).carrying(self.x, self.target, None, *self.middle)
        return value, left

    def backward(self, left: torch.Tensor, upstream: float = 1.0) -> torch.Tensor:
        op = getattr(OPS, f"{self.loss.op}_backward")
        upstreams = (torch.tensor(upstream, dtype=self.x.dtype),)
        if self.loss in SOFTMAX:
            return op(*upstreams, None, self.x, self.target, None, left, *self.middle)
        return op(*upstreams, self.x, self.target, None, *self.middle, carrier=left)


def eager_gradient(step: Step, upstream: float = 1.0) -> torch.Tensor:
    x = step.x.clone().requires_grad_()
    value = step.loss.fused(x, step.target, "mean")
    (grad,) = torch.autograd.grad(value, x, torch.tensor(upstream, dtype=x.dtype))
    return grad


@each_of(CARRYING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backward_gives_the_bits_of_eager(loss, dtype):
    step = Step(loss, dtype)
    for upstream in (1.0, 0.5, 3.0):
        _, left = step.forward()
        expected = eager_gradient(step, upstream)
        for _ in range(3):  # a graph that is retained, and memory of its own each time
            grad = step.backward(left, upstream)
            assert torch.equal(grad, expected)
            grad.zero_()


@each_of(CARRYING)
def test_the_first_backward_makes_no_gradient(loss):
    step = Step(loss)
    expected = eager_gradient(step)
    _, left = step.forward()
    step.x.fill_(0.5)  # which no compiler does
    assert torch.equal(step.backward(left), expected)
    torch.testing.assert_close(step.backward(left), eager_gradient(step))


@each_of(CARRYING)
def test_a_copy_of_what_forward_left_carries_nothing_and_does_no_harm(loss):
    """As after offloading: a saved tensor comes back as another one."""
    step = Step(loss)
    _, left = step.forward()
    torch.testing.assert_close(step.backward(left.clone()), eager_gradient(step))


@each_of([loss for loss in CARRYING if loss.op not in ARITHMETIC])
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_a_compiled_step_carries_it(loss):
    step = Step(loss)
    compiled, ops = compiled_with_ops(lambda x: loss.fused(x * 2, step.target, "mean"))
    x = (step.x / 2).requires_grad_()
    compiled(x).backward()
    assert f"fusedloss.{loss.op}.carrying" in ops
    torch.testing.assert_close(x.grad, 2 * eager_gradient(step))
    ops.clear()
    with torch.no_grad():
        compiled(x)
    assert f"fusedloss.{loss.op}.default" in ops


def test_threads_that_run_one_backward_get_a_gradient_each():
    x, y = torch.randn(200, 1000), torch.zeros(200, dtype=torch.long)
    call = (1, -100, [0.0, 0.0, 0.0])
    for _ in range(20):
        _, left = OPS.cross_entropy.carrying(x, y, None, *call)
        backward = lambda _, left=left: OPS.cross_entropy_backward(torch.tensor(1.0), None, x, y, None, left, *call)  # noqa: E731
        with ThreadPoolExecutor(3) as pool:
            grads = list(pool.map(backward, range(3)))
        assert len({grad.data_ptr() for grad in grads}) == 3
        assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_a_gradient_that_nobody_asks_for_goes_with_what_carries_it():
    x, y = torch.randn(2000, 1000), torch.zeros(2000, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):  # 8 MB each
        OPS.cross_entropy.carrying(x, y, None, MEAN, -100, [0.0, 0.0, 0.0])
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # of 1024 bytes
