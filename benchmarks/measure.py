"""The measurement of a case: the gradient of every provider checked against torch eager, then all timed in turn."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch

from fusedloss._bench import peak_bytes

from .case import BACKWARD, BOTH, FORWARD, Call, Case, Inputs, Loss, Timed
from .cases import CALLS
from .peers import OVERWRITES, describe
from .results import COPY, EAGER, OURS, Row, Times

# Elements compared at a time: what a CPU's caches hold, and on a GPU little of its memory.
CHUNKS = {"cpu": 1 << 18, "cuda": 1 << 26}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # eager loses some of bfloat16's 8 bits on the way

# Times the calls of all providers in turn; is told what is timed.
Clock = Callable[[dict[str, Timed], str], Times]


class Measured(NamedTuple):
    row: Row
    times: Times
    threads: int  # that torch had


def measure(
    case: Case,
    clock: Clock,
    compile: bool = True,
    peers: dict[str, Loss] | None = None,
    missing: dict[str, str] | None = None,
    threads: Sequence[int] = (),
) -> Iterator[Measured]:
    """Raises where fusedloss or torch itself is wrong or fails; what any other provider does is a note.

    The peers, and why others are missing, are those of the case. With several counts of threads, each is timed.
    """
    threads = threads or (torch.get_num_threads(),)
    torch.set_num_threads(max(threads))
    torch._dynamo.reset()  # shapes of the case before would make this one compile with dynamic shapes
    if case.device == "cuda":
        functorch.donated_buffer = False  # such buffers serve once, and backward alone is timed again and again
    losses = dict(case.losses)
    if "compile" in (names := case.providers(compile)):
        losses["compile"] = compiled(case)
    losses = {name: losses[name] for name in names}
    inputs, target = case.data()
    for timed, timing in case.timed.items():
        providers = {**losses, OURS: timing.fused or losses[OURS]}
        # Liger makes its gradient in forward, so that forward and backward compare only in sum.
        compared = bool(case.peers) and timed == BOTH
        calls, notes = checked(case, timed, {**providers, **(peers or {})} if compared else providers, inputs, target)
        peak = {name: peak_bytes(one.call, case.device) for name, one in calls.items()}
        names = list(calls)
        if case.device == "cpu":
            calls[COPY] = Timed(copying(inputs))
        for count in threads:
            torch.set_num_threads(count)
            times = clock(calls, timed)
            row = Row(
                case.name,
                timed,
                timing.passes,
                case.elements,
                case.dtype.itemsize,
                {name: times.seconds(name) for name in names},
                {name: times.spread(name) for name in names},
                {**notes, **(missing or {})} if compared else notes,
                timing.goals,
                timing.other_bytes(target),
                {name: ratio for name in calls if name != OURS and (ratio := times.speedup(OURS, name)) is not None},
                peak,
                times.quiet,
                case.flops,
                case.family,
                times.seconds(COPY) if COPY in calls else None,
            )
            yield Measured(row, times, count)
        torch.set_num_threads(max(threads))


def compiled(case: Case) -> Loss:
    """One compilation serves every count of threads, and is as fast as one for each. But it runs even the smallest loss
    in a parallel region, which takes longer than that loss, so that the smallest are compiled for each count."""
    any_count = case.device == "cpu" and case.family != CALLS
    return torch.compile(case.losses[EAGER], dynamic=False, options={"cpp.dynamic_threads": any_count})


def copying(inputs: Inputs) -> Call:
    sources = [each.detach() for each in inputs]
    copies = [torch.zeros_like(each) for each in sources]
    return lambda: [copy.copy_(source) for copy, source in zip(copies, sources, strict=True)]


def checked(
    case: Case, timed: str, losses: dict[str, Loss], inputs: Inputs, target: Tensor
) -> tuple[dict[str, Timed], dict[str, str]]:
    """What is timed for the providers whose gradient is right; for the others, why not."""
    calls: dict[str, Timed] = {}
    notes: dict[str, str] = {}
    expected = gradients(case.losses[EAGER], inputs, target)
    for name, loss in losses.items():
        try:
            # Liger writes its gradient over the logits: it gets its own, which are copied anew, untimed, before a call.
            overwrites = name in OVERWRITES.get(case.peers, ())
            own = tuple(each.detach().clone().requires_grad_() for each in inputs) if overwrites else inputs
            before = partial(restore, own, inputs) if overwrites else None
            off = [error(*pair) for pair in zip(gradients(loss, own, target), expected, strict=True)]
            if name not in case.different and not all(each <= TOLERANCES[case.dtype] for each in off):
                parts = ", ".join(f"{each:.2g}" for each in off)
                raise ArithmeticError(f"the gradient of {name} is off by {parts} of its norm")
            calls[name] = Timed(call_of(timed, loss, own, target), before)
        except Exception as failure:
            if name in (OURS, EAGER):
                raise
            notes[name] = describe(failure)
    return calls, notes


def gradients(loss: Loss, inputs: Inputs, target: Tensor) -> Inputs:
    return torch.autograd.grad(loss(*inputs, target), inputs)


def restore(inputs: Inputs, originals: Inputs) -> None:
    with torch.no_grad():
        for input, original in zip(inputs, originals, strict=True):
            input.copy_(original)


def call_of(timed: str, loss: Loss, inputs: Inputs, target: Tensor) -> Call:
    if timed == FORWARD:
        return lambda: loss(*inputs, target)
    if timed == BACKWARD:
        value = loss(*inputs, target)
        upstream = torch.ones_like(value)
        return lambda: torch.autograd.grad(value, inputs, upstream, retain_graph=True)
    return lambda: gradients(loss, inputs, target)


def error(got: Tensor, expected: Tensor) -> float:
    """The distance of the gradients relative to the expected one's norm; NaN is never less than anything."""
    off = norm = 0.0
    chunk = CHUNKS[got.device.type]
    for a, b in zip(got.flatten().split(chunk), expected.flatten().split(chunk), strict=True):
        off += (a.double() - b.double()).square().sum().item()
        norm += b.double().square().sum().item()
    return (off / norm if norm else off) ** 0.5  # of a loss of 0 the gradient may be 0
