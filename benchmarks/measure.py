"""The measurement of a case: all its providers, checked against each other, then timed in turn."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from case import Case, Loss, minimum_traffic
from memory import peak_bytes
from timing import Times, in_turn
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """The numbers of a case; it holds no tensors, so that a session can keep all of them."""

    case: Case
    times: Times
    peak: dict[str, int]
    input_bytes: int
    traffic: int

    def bandwidth(self, provider: str) -> float:
        """Bytes of minimum traffic per second."""
        return self.traffic / self.times.seconds(provider)

    def speedup(self, provider: str, over: str) -> float | None:
        return self.times.speedup(provider, over) if over in self.peak else None

    def goals(self) -> dict[str, str]:
        """The goals of the case, each "met" or "MISSED" by what was reached; times on a busy machine are not judged."""
        case, goals = self.case, {}
        speedup = self.speedup("fused", case.over)
        if case.speedup is not None and speedup is not None:
            verdict = _verdict(speedup >= case.speedup, speedup) if self.times.quiet else "not judged"
            goals[f"{case.speedup:.3g} x {case.over}"] = verdict
        if case.over_compile is not None and (over := self.speedup("fused", "compile")) is not None:
            verdict = _verdict(over >= case.over_compile, over) if self.times.quiet else "not judged"
            goals[f"{case.over_compile:g} x compile"] = verdict
        if case.memory is not None:
            memory = self.peak["fused"] / self.input_bytes
            goals[f"memory {case.memory:g} x input"] = _verdict(memory <= case.memory, memory)
        return goals


def _verdict(met: bool, reached: float) -> str:
    return f"{'met' if met else 'MISSED'} ({reached:.2f})"


@dataclass(frozen=True)
class Measured:
    """A result with the functions it came from; they hold the input and the target."""

    result: Result
    calls: dict[str, Callable[[], Tensor]]


def providers(case: Case, compile: bool) -> list[str]:
    first, *rest = case.losses()
    return [first, *(["compile"] if compile and case.compiled else []), *rest]


def measure(case: Case, compile: bool) -> Measured:
    torch._dynamo.reset()  # shapes of the case before would make this one compile with dynamic shapes
    losses = case.losses()
    if compile and case.compiled:
        losses["compile"] = torch.compile(case.eager)
    input, target = case.data()
    calls = {name: _forward_backward(losses[name], input, target) for name in providers(case, compile)}
    _check({name: call for name, call in calls.items() if case.peer is None or name != case.peer[0]})
    peak = {name: peak_bytes(call) for name, call in calls.items()}
    times = in_turn(dict(calls), torch.get_num_threads())
    return Measured(Result(case, times, peak, input.nbytes, minimum_traffic(input, target)), calls)


def _forward_backward(loss: Loss, input: Tensor, target: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(loss(input, target), input)[0]


def _check(calls: dict[str, Callable[[], Tensor]]) -> None:
    """A time counts only for the right gradient. bfloat16 keeps 8 bits, of which eager loses some on the way."""
    expected = calls["eager"]()
    tolerance = 0.05 if expected.dtype == torch.bfloat16 else 1e-4
    for name, call in calls.items():
        error = torch.linalg.vector_norm((call() - expected).float()) / torch.linalg.vector_norm(expected.float())
        if not error <= tolerance:
            raise AssertionError(f"the gradient of {name} is off by {error:.2g} of its norm")
