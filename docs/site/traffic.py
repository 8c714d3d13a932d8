"""The bytes that each loss moves, as the benchmarks count them."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.case import Case
from benchmarks.cases import cpu_cases, cuda_cases
from benchmarks.results import OURS, Row

from .calls import called_by

NOTHING_TO_SEE = 1e6  # bytes: a smaller case measures what a call costs


def function_of(case: Case) -> str | None:
    """The function that the case measures: it runs once, on a tensor of few numbers."""
    small = replace(
        case, shape=tuple(min(size, 64) for size in case.shape), classes=min(case.classes, 64), device="cpu"
    )
    inputs, target = small.data()
    calls = called_by(lambda: case.losses[OURS](*inputs, target))
    return calls[0].name if calls else None


def rows(case: Case) -> Iterator[Row]:
    with FakeTensorMode():  # a size is all that is asked
        _, target = replace(case, device="cpu").data()
    for timed, timing in case.timed.items():
        yield Row(
            case.name, timed, timing.passes, case.elements, case.dtype.itemsize, {},
            other_bytes=timing.other_bytes(target), flops=case.flops,
        )  # fmt: skip


def described(row: Row) -> str:
    if row.flops:
        return f"{row.flops / 1e12:.3g} TFLOP"
    others = f" + {row.other_bytes}" if row.other_bytes else ""
    return f"{row.passes} x {row.elements} x {row.element_bytes}{others} = {row.bytes / 1e6:,.1f} MB"


def counted() -> dict[str, list[list[str]]]:
    """By function: the case, the device, what is timed, and the sum of bytes; of a linear loss, the operations."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    for case in (*cpu_cases(quick=False), *cuda_cases(quick=False)):
        if "custom" in case.name:  # an expression that would be compiled
            continue
        large = [row for row in rows(case) if row.bytes > NOTHING_TO_SEE or row.flops]
        if large and (name := function_of(case)):
            found[name] += [[row.case, case.device, row.timed, described(row)] for row in large]
    return found
