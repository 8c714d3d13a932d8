"""Ctrl-C anywhere in a call: it comes through, nothing of it stays behind, and the next call is right."""

import gc
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import accumulate, count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import upstreams
from linear_calls import indices, operands
from linear_distillation_calls import call as divergence
from linear_distillation_calls import operands as operands_of_pair
from losses import loss_named
from marks import needs_compiler, needs_extension, on_cpu_alone
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

import fusedloss
import fusedloss.functional as L
from fusedloss import _decomposed, _route
from fusedloss.adoption import _calls, _patch
from fusedloss.adoption._places import places
from fusedloss.custom._definition import PATHS

PACKAGE = str(Path(fusedloss.__file__).parent)
pytestmark = on_cpu_alone("what is interrupted is Python, the same there")
ORIGINALS = {name: getattr(F, name) for name in ("cross_entropy", "mse_loss", "huber_loss")}


class Interrupter:
    """Raises KeyboardInterrupt at one of the points where Python looks for signals: where a function of the package
    begins, and behind each call of another one. The first is number 1."""

    def __init__(self, point: int) -> None:
        self.left = point

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(PACKAGE):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def __enter__(self) -> "Interrupter":
        self.before = sys.getprofile(), sys.unraisablehook
        sys.unraisablehook = lambda dropped: None  # pytest's keeps what was dropped, and its frames
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before[0])
        sys.unraisablehook = self.before[1]


def state() -> tuple[Any, ...]:
    """What a call may set while it runs."""
    return (
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), len(_get_current_function_mode_stack()),
        torch._C._len_torch_dispatch_stack(), _route._asking.get(), _calls.current.listens, _calls.current.why,
        [getattr(F, name) is original for name, original in ORIGINALS.items()], dict(_patch._standing),
        torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled(),
    )  # fmt: skip


def undo_lost_patches() -> None:
    """An interrupt between patch() and its block leaves the whole patch, as it would an open file."""
    for lost in {patch for standing in _patch._standing.values() for patch in standing.patches}:
        assert len(lost._held) == len(places("torch"))
        lost.undo()


def through_patch(x: Tensor) -> Tensor:
    with fusedloss.patch():
        return F.cross_entropy(x, torch.arange(4))


def through_scope(x: Tensor) -> Tensor:
    with fusedloss.scope():
        return F.cross_entropy(x, torch.arange(4))


def explained(x: Tensor) -> Tensor:
    fusedloss.explain(L.cross_entropy, x, torch.arange(4))
    return L.cross_entropy(x, torch.arange(4))


LEAVES = operands()
OF_PAIR = operands_of_pair()
TARGET = indices()
CALLS: dict[str, tuple[list[Tensor], Callable[..., Any]]] = {
    "cross-entropy": ([torch.randn(4, 5)], lambda x: L.cross_entropy(x, torch.arange(4), label_smoothing=0.1)),
    "native": ([torch.randn(4, 5)], lambda x: L.triplet_margin_loss(x, torch.zeros(4, 5), torch.ones(4, 5), p=3.0)),
    "over the logits": ([torch.randn(4, 5)], lambda x: L.cross_entropy(x * 1, torch.arange(4), inplace=True)),
    "huber": ([torch.randn(4, 5)], lambda x: L.huber_loss(x, torch.zeros(4, 5))),
    "patch": ([torch.randn(4, 5)], through_patch),
    "scope": ([torch.randn(4, 5)], through_scope),
    "explain": ([torch.randn(4, 5)], explained),
    "linear": (list(LEAVES), lambda *x: L.linear_cross_entropy(*x[:2], TARGET, linear_bias=x[2], chunk_rows=5)),
    "linear, in backward": (
        list(LEAVES[:2]),
        lambda *x: L.linear_cross_entropy(*x, TARGET, chunk_rows=5, grad_in_forward=False),
    ),
    "linear divergence": (
        [OF_PAIR["input"], OF_PAIR["linear_weight"]],
        lambda x, w: divergence({**OF_PAIR, "input": x, "linear_weight": w}),
    ),
}


def step(name: str) -> list[Tensor]:
    """The loss and the gradients, which are added to ones."""
    leaves, loss = CALLS[name]
    leaves = [each.detach().clone().requires_grad_() for each in leaves]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    watched.extend(weakref.ref(leaf) for leaf in leaves)
    value = loss(*leaves)
    value.backward(upstreams(value)[0])
    return [value.detach(), *[leaf.grad for leaf in leaves]]


watched: list["weakref.ref[Tensor]"] = []


@pytest.fixture
def set_handler() -> Iterator[Callable[..., None]]:
    """Sets the handler of a signal, until the test ends."""
    before: dict[int, Any] = {}

    def handle(number: int, handler: Any) -> None:
        before[number] = signal.signal(number, handler)

    yield handle
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted(name: str, point: int) -> bool:
    """Whether the step has so many points; it ends there then."""
    try:
        with Interrupter(point) as interrupter:
            step(name)
    except KeyboardInterrupt:
        return True
    return interrupter.left == 0  # in a generator that nobody needs any more, where Python drops every exception


def at_points(name: str, points: Iterable[int]) -> None:
    """Interrupts a step at these points, up to its last one."""
    expected, before = step(name), state()
    watched.clear()
    ended = 0
    for point in points:
        if not interrupted(name, point):
            break
        undo_lost_patches()
        assert state() == before, f"point {point}"
        ended += 1
    assert ended > 2
    for got, wanted in zip(step(name), expected, strict=True):
        assert torch.equal(got, wanted)
    gc.collect()
    assert not any(leaf() is not None for leaf in watched), "a graph was kept"


def fewer_and_fewer(all_to: int) -> Iterator[int]:
    """Every number to that one, then fewer and fewer."""
    return accumulate(count(), lambda point, _: point + 1 + point // all_to, initial=1)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_some_points(name):
    at_points(name, fewer_and_fewer(4 if name == "patch" else 20))


@pytest.mark.deep("an interrupt at every third point of the linear losses; some ran")
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("linear")])
def test_an_interrupt_at_many_points(name):
    at_points(name, count(1, 3))


def test_an_undo_that_was_interrupted_may_be_repeated():
    for point in fewer_and_fewer(10):
        patched = fusedloss.patch()
        patched._copies = lambda: iter(())  # names of all modules, thousands of points
        with suppress(KeyboardInterrupt), Interrupter(point) as interrupter:
            patched.undo()
        patched.undo()
        assert all(getattr(F, name) is original for name, original in ORIGINALS.items()) and not _patch._standing
        if interrupter.left:
            break
    assert point > 40


@needs_extension
@needs_compiler
@pytest.mark.deep("a loss of one's own whose definition is interrupted; it compiles")
@pytest.mark.parametrize("make", [fusedloss.pointwise_loss, fusedloss.softmax_loss], ids=lambda make: make.__name__)
def test_a_definition_that_was_interrupted_may_be_repeated(make, monkeypatch):
    define = lambda: make("interrupted", "square(x - t)" if make is fusedloss.pointwise_loss else "1 - p")  # noqa: E731
    expected = repr(define())
    for module, name in [(_decomposed, "register"), (_route, "pointwise"), (_route, "softmax")]:
        original = getattr(module, name)

        def interrupted(*given: Any, original: Any = original, **options: Any) -> None:
            original(*given, **options)
            raise KeyboardInterrupt

        for op in [op for op in PATHS if op.startswith("custom_interrupted")]:
            del PATHS[op]  # as where no definition came so far
        monkeypatch.setattr(module, name, interrupted)
        with suppress(KeyboardInterrupt):
            define()
        monkeypatch.undo()
        assert repr(define()) == expected
    loss = define()
    x = torch.randn(4, 5, requires_grad=True)
    value = loss(x, torch.zeros(4, 5) if make is fusedloss.pointwise_loss else torch.arange(4))
    value.backward()
    assert loss.fused and value.isfinite() and x.grad.any()


@needs_extension
def test_an_interrupt_between_forward_and_backward_leaves_a_graph_that_runs():
    loss = loss_named("cross_entropy")
    x, target = loss.data((40, 9), torch.float32)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss.fused(x, target, "mean"), x)
    with pytest.raises(KeyboardInterrupt):
        value = loss.fused(x, target, "mean")
        signal.raise_signal(signal.SIGINT)
    (found,) = torch.autograd.grad(value, x)
    assert torch.equal(found, expected)


@needs_extension
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of signals; every point was interrupted above")
def test_an_interrupt_at_any_time_of_a_step(set_handler):
    """Where C++ runs, the signal waits for its end. Not of a scope: torch takes its mode off the stack and puts it back
    in a way that an interrupt breaks."""
    before, random = state(), torch.Generator("cpu").manual_seed(0)
    expected = {name: step(name) for name in CALLS if name != "scope"}
    set_handler(signal.SIGALRM, signal.default_int_handler)
    for name in [*expected] * 8:
        after = 1e-6 + 2e-3 * torch.rand((), generator=random, device="cpu").item()
        with suppress(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, after)
            for _ in range(1000):
                step(name)
        undo_lost_patches()
        assert state() == before
        for got, wanted in zip(step(name), expected[name], strict=True):
            assert torch.equal(got, wanted)
