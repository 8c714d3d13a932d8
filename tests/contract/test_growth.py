"""A step leaves nothing behind: 10,000 of them hold no more memory or objects than the first tenth."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_calls import ROUTES, call, indices, operands
from linear_distillation_calls import call as divergence_of_heads
from linear_distillation_calls import operands as operands_of_pair
from losses import ONE_OF_EACH
from marks import needs_extension, on_cpu_alone
from row_sums_calls import made, of
from torch import Tensor

import fusedloss
import fusedloss.functional as L

pytestmark = [
    needs_extension,
    on_cpu_alone("reads what the process holds; gpu/test_gpu.py counts a GPU's memory"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what the process holds"),
]
STEPS_OF_KERNELS, STEPS_IN_PYTHON = 10_000, 1000  # a step of a linear loss takes a millisecond
SLACK = 30  # bytes a step; the smallest tensor takes 300
Step = Callable[[], Any]


def stepped(loss: Callable[..., Tensor], *leaves: Tensor) -> Step:
    leaves = tuple(each.detach().clone().requires_grad_() for each in leaves)

    def step() -> None:
        value = loss(*leaves)
        (value[0] if isinstance(value, tuple) else value).sum().backward()

    return step


def raising(loss: Callable[[], Any]) -> Step:
    def step() -> None:
        try:
            loss()
        except (RuntimeError, ValueError, IndexError):
            return
        raise AssertionError("expected an error")

    return step


def twice(loss: Callable[..., Tensor], x: Tensor) -> Step:
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        grad.square().sum().backward()

    return step


class Native(Tensor):
    """A tensor that no kernel takes."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def in_scope() -> None:
    with fusedloss.scope():
        F.cross_entropy(X, Y)


X, Y = torch.randn(4, 5), torch.arange(4)
LEAF = X.clone().requires_grad_()
STEPS: dict[str, Step] = {
    loss.name: stepped(lambda x, loss=loss, t=loss.data((4, 5), torch.float32)[1]: loss.fused(x, t, "mean"),
                       loss.data((4, 5), torch.float32)[0])
    for loss in ONE_OF_EACH
}  # fmt: skip
for name in ("cosine", "triplet", "triplet, norm 1, swap", "margins, weight"):
    wanted, options = made(name, (4,), 5, torch.float32)
    STEPS[name] = stepped(of(L, name, options), *wanted)
STEPS |= {
    "each row": stepped(lambda x: L.cross_entropy(x, Y, reduction="none"), X),
    "with lse": stepped(lambda x: L.cross_entropy(x, Y, return_lse=True), X),
    "bfloat16": stepped(lambda x: L.cross_entropy(x, Y), X.bfloat16()),
    "over the logits": stepped(lambda x: L.cross_entropy(x * 1, Y, inplace=True), X),
    "natively": stepped(lambda x: L.cross_entropy(x.as_subclass(Native), Y).as_subclass(Tensor), X),
    "divergence": stepped(lambda x: L.kl_divergence(x, X), X),
    "without a backward": lambda: L.cross_entropy(LEAF, Y),
    "second derivative": twice(lambda x: L.cross_entropy(x, Y), X),
    "second derivative, huber": twice(lambda x: L.huber_loss(x, torch.zeros(4, 5)), X),
    "a class out of range": raising(lambda: L.cross_entropy(X, Y + 3)),
    "a wrong shape": raising(lambda: L.binary_cross_entropy(X.sigmoid(), torch.ones(3))),
    "scope": in_scope,
    "explain": lambda: fusedloss.explain(L.cross_entropy, X, Y),
    "a module": lambda: fusedloss.CrossEntropyLoss(label_smoothing=0.1)(X, Y),
}

LINEAR: dict[str, Step] = {
    route: stepped(lambda x, w, options=options: call((x, w), indices((4,)), 2, **options)[0], *operands((4,))[:2])
    for route, options in ROUTES.items()
    if route in ("in forward", "in backward", "each row, with lse")
}
PAIR = operands_of_pair((4,))
LINEAR["divergence"] = stepped(
    lambda x, w: divergence_of_heads({**PAIR, "input": x, "linear_weight": w}, 2), PAIR["input"], PAIR["linear_weight"]
)
STEPS |= {f"linear, {name}": step for name, step in LINEAR.items()}


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(step: Step, steps: int) -> tuple[float, int]:
    """Bytes a step, in that third of all but the first tenth which has fewest, and objects in all of them.

    What grows once is no leak: a cache, or a heap that the allocator asks for.
    """

    def run(count: int) -> int:
        for _ in range(count):
            step()
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # of glibc: what is free goes back, and counts no more
        return resident()

    third = steps * 3 // 10
    before, objects = run(steps // 10), len(gc.get_objects())
    after = [before, *(run(third) for _ in range(3))]
    least = min(later - earlier for earlier, later in zip(after, after[1:], strict=False))
    return least / third, len(gc.get_objects()) - objects


@pytest.mark.deep("10,000 steps of each kind of loss; tests of graphs and of memory count what one step keeps")
@pytest.mark.parametrize("kind", STEPS)
def test_ten_thousand_steps_hold_what_a_thousand_do(kind):
    bytes_of_step, objects = growth(STEPS[kind], STEPS_IN_PYTHON if kind.startswith("linear") else STEPS_OF_KERNELS)
    assert bytes_of_step < SLACK and objects < 50


def test_growth_is_seen():
    kept: list[Any] = []
    assert growth(lambda: kept.append(torch.ones(1000)), 5000)[0] > SLACK
    assert growth(lambda: kept.append([]), 5000)[1] > 4000
