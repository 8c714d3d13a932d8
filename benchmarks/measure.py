"""The measurement of a case: the gradient of every provider checked against torch eager, then all timed in turn."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch._functorch import config as functorch

from .case import BACKWARD, BOTH, FORWARD, Call, Case, Loss, Timed
from .memory import peak_bytes
from .peers import OVERWRITES, describe
from .results import EAGER, OURS, Row, Times

CHUNK = 1 << 26  # elements compared at a time, so that the comparison needs little memory
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # eager loses some of bfloat16's 8 bits on the way

# Times the calls of all providers in turn; is told what is timed.
Clock = Callable[[dict[str, Timed], str], Times]


def measure(
    case: Case,
    clock: Clock,
    compile: bool = True,
    peers: dict[str, Loss] | None = None,
    missing: dict[str, str] | None = None,
) -> Iterator[tuple[Row, Times]]:
    """Raises where fusedloss or torch itself is wrong or fails; what any other provider does is a note.

    The peers, and why others are missing, are for cases by rows.
    """
    torch._dynamo.reset()  # shapes of the case before would make this one compile with dynamic shapes
    if case.device == "cuda":
        functorch.donated_buffer = False  # such buffers serve once, and backward alone is timed again and again
    losses = dict(case.losses)
    if "compile" in (names := case.providers(compile)):
        losses["compile"] = torch.compile(case.losses[EAGER], dynamic=False)
    losses = {name: losses[name] for name in names}
    input, target = case.data()
    for timed, timing in case.timed.items():
        providers = {**losses, OURS: timing.fused or losses[OURS]}
        # Liger makes its gradient in forward, so that forward and backward compare only in sum.
        compared = case.by_rows and timed == BOTH
        calls, notes = checked(case, timed, {**providers, **(peers or {})} if compared else providers, input, target)
        peak = {name: peak_bytes(one.call) for name, one in calls.items()} if case.device == "cpu" else {}
        times = clock(calls, timed)
        names = list(calls)
        del calls
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
            (target.nbytes if timing.count_target else 0) + timing.row_bytes * target.numel(),
            {name: ratio for name in names if name != OURS and (ratio := times.speedup(OURS, name)) is not None},
            peak,
            times.quiet,
        )
        yield row, times


def checked(
    case: Case, timed: str, losses: dict[str, Loss], input: Tensor, target: Tensor
) -> tuple[dict[str, Timed], dict[str, str]]:
    """What is timed for the providers whose gradient is right; for the others, why not."""
    calls: dict[str, Timed] = {}
    notes: dict[str, str] = {}
    expected = gradient(case.losses[EAGER], input, target)
    for name, loss in losses.items():
        try:
            # Liger writes its gradient over the logits: it gets its own, which are copied anew, untimed, before a call.
            own = input.detach().clone().requires_grad_() if name in OVERWRITES else input
            before = partial(restore, own, input) if name in OVERWRITES else None
            off = error(gradient(loss, own, target), expected)
            if name not in case.different and not off <= TOLERANCES[case.dtype]:
                raise ArithmeticError(f"the gradient of {name} is off by {off:.2g} of its norm")
            calls[name] = Timed(call_of(timed, loss, own, target), before)
        except Exception as failure:
            if name in (OURS, EAGER):
                raise
            notes[name] = describe(failure)
    return calls, notes


def gradient(loss: Loss, input: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(loss(input, target), input)[0]


def restore(logits: Tensor, original: Tensor) -> None:
    with torch.no_grad():
        logits.copy_(original)


def call_of(timed: str, loss: Loss, input: Tensor, target: Tensor) -> Call:
    if timed == FORWARD:
        return lambda: loss(input, target)
    if timed == BACKWARD:
        value = loss(input, target)
        upstream = torch.ones_like(value)
        return lambda: torch.autograd.grad(value, input, upstream, retain_graph=True)
    return lambda: gradient(loss, input, target)


def error(got: Tensor, expected: Tensor) -> float:
    """The distance of the gradients relative to the expected one's norm; NaN is never less than anything."""
    off = norm = 0.0
    for a, b in zip(got.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True):
        off += (a.double() - b.double()).square().sum().item()
        norm += b.double().square().sum().item()
    return (off / norm) ** 0.5
