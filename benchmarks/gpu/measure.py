"""The measurement of a case: the gradient of every provider checked against torch eager, then all timed in turn."""

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch._functorch import config as functorch

from .cases import BACKWARD, BOTH, CALL, FORWARD, Case, Loss
from .peers import OVERWRITES, describe
from .results import OURS, Row
from .timing import Call, ColdCache, Timed, on_device, on_host, spread

CHUNK = 1 << 26  # elements compared at a time, so that the comparison needs little memory
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # eager loses some of bfloat16's 8 bits on the way

# Donated buffers could be used once only, and backward alone is timed again and again.
functorch.donated_buffer = False


def gradient(loss: Loss, input: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(loss(input, target), input)[0]


def rows(case: Case, peers: dict[str, Loss], missing: dict[str, str], rounds: int, cold: ColdCache) -> Iterator[Row]:
    """Raises where fusedloss or torch itself is wrong or fails; what any other provider does is a note."""
    torch._dynamo.reset()  # shapes of the case before would make this one compile with dynamic shapes
    compiled = torch.compile(case.eager, dynamic=False)
    input, target = case.data()
    for timed, (passes, goals) in case.timed.items():
        losses: dict[str, Loss] = {OURS: case.variants.get(timed, case.fused), "eager": case.eager, "compile": compiled}
        # Liger makes its gradient in forward, so that forward and backward compare only in sum.
        compared = case.by_rows and timed == BOTH
        calls, notes = checked(case, timed, {**losses, **peers} if compared else losses, input, target)
        samples = on_host(calls, rounds) if timed == CALL else on_device(calls, rounds, cold)
        del calls
        yield Row(
            case.name,
            timed,
            passes,
            case.elements,
            case.dtype.itemsize,
            {name: median(of_one) for name, of_one in samples.items()},
            {name: spread(of_one) for name, of_one in samples.items()},
            {**notes, **missing} if compared else notes,
            goals,
        )


def checked(
    case: Case, timed: str, losses: dict[str, Loss], input: Tensor, target: Tensor
) -> tuple[dict[str, Timed], dict[str, str]]:
    """What is timed, of the providers whose gradient is right; of the others, why not."""
    calls: dict[str, Timed] = {}
    notes: dict[str, str] = {}
    expected = gradient(case.eager, input, target)
    for name, loss in losses.items():
        try:
            # Liger writes its gradient over the logits: it gets its own, which are copied anew, untimed, before a call.
            own = input.detach().clone().requires_grad_() if name in OVERWRITES else input
            before = partial(restore, own, input) if name in OVERWRITES else None
            off = error(gradient(loss, own, target), expected)
            if not off <= TOLERANCES[case.dtype]:
                raise ArithmeticError(f"the gradient is off by {off:.2g} of its norm")
            calls[name] = Timed(call_of(timed, loss, own, target), before)
        except Exception as failure:
            if name in (OURS, "eager"):
                raise
            notes[name] = describe(failure)
    return calls, notes


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
    """Of the gradient, relative to its norm; NaN is never less than anything."""
    off = norm = 0.0
    for a, b in zip(got.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True):
        off += (a.double() - b.double()).square().sum().item()
        norm += b.double().square().sum().item()
    return (off / norm) ** 0.5
