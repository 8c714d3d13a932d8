"""The cases of the GPU at a size for the CPU: what they call is right, and every pass of them can be called."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .case import BACKWARD, Case, Timed
from .cases import CALLS, cpu_cases, cpu_sweeps, cuda_cases
from .measure import checked, gradients, measure
from .results import COPY, EAGER, OURS, Times

CPU_CASES, CUDA_CASES = [*cpu_cases(quick=False), *cpu_sweeps()], list(cuda_cases(quick=False))
LINEAR_CASES = [case for case in CPU_CASES if case.classes]


def on_cpu(case: Case) -> Case:
    shape = (64,) if len(case.shape) == 1 else (3, 5, *(2 for _ in case.shape[2:]))
    return replace(case, shape=shape, classes=min(case.classes, 7), device="cpu")


@pytest.mark.parametrize("cases", [CPU_CASES, CUDA_CASES], ids=["cpu", "cuda"])
def test_names_are_unique(cases: list[Case]) -> None:
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(("cases", "all"), [(cpu_cases, CPU_CASES), (cuda_cases, CUDA_CASES)], ids=["cpu", "cuda"])
def test_quick_is_a_part_of_all(cases: Callable[[bool], Iterator[Case]], all: list[Case]) -> None:
    assert {case.name for case in cases(True)} < {case.name for case in all}


@pytest.mark.parametrize("case", [*LINEAR_CASES, *CUDA_CASES], ids=lambda case: f"{case.device}-{case.name}")
def test_case(case: Case) -> None:
    small = on_cpu(case)
    inputs, target = small.data()
    assert [each.shape for each in inputs] == [small.shape, *([(7, 5)] if case.classes else [])]
    assert all(each.dtype == case.dtype and each.requires_grad for each in inputs)
    assert sum(each.numel() for each in inputs) == small.elements
    for timed, timing in small.timed.items():
        losses = {**small.losses, OURS: timing.fused or small.losses[OURS]}
        calls, notes = checked(small, timed, losses, inputs, target)
        assert set(calls) == set(losses) and not notes
        for call in calls.values():
            first = call.call()
            assert all(torch.isfinite(value).all() for value in (first if isinstance(first, tuple) else (first,)))
            if timed == BACKWARD:
                call.call()  # the graph is kept, so that backward alone can be timed again


def test_every_count_of_threads_is_timed() -> None:
    """A CPU's rows have their family and the time of a copy, in turn with the providers."""
    case = replace(next(case for case in CPU_CASES if case.name == "huber-fp32-64"), shape=(6,))
    had = torch.get_num_threads()

    def clock(calls: dict[str, Timed], _: str) -> Times:
        copies: Any = calls[COPY].call()
        assert torch.equal(copies[0], case.data()[0][0])
        return Times({name: [float(torch.get_num_threads())] for name in calls})

    measured = list(measure(case, clock, compile=False, threads=(2, 1)))
    torch.set_num_threads(had)
    assert [threads for *_, threads in measured] == [2, 1]
    assert [row.seconds for row, *_ in measured] == [{EAGER: 2, OURS: 2}, {EAGER: 1, OURS: 1}]
    assert [(row.family, row.copy_seconds, row.speedup(COPY)) for row, *_ in measured] == [(CALLS, 2, 1), (CALLS, 1, 1)]


def test_a_wrong_gradient_of_ours_raises() -> None:
    case = on_cpu(next(case for case in CUDA_CASES if case.name.startswith("huber")))
    inputs, target = case.data()
    eager = case.losses[EAGER]

    def wrong(x: Tensor, t: Tensor) -> Tensor:
        return 2 * eager(x, t)

    with pytest.raises(ArithmeticError, match="off by 1 of its norm"):
        checked(case, "", {EAGER: eager, OURS: wrong}, inputs, target)
    calls, notes = checked(case, "", {EAGER: eager, "Liger": wrong}, inputs, target)
    assert set(calls) == {EAGER} and "off by 1 of its norm" in notes["Liger"]


def test_a_wrong_gradient_of_a_head_raises() -> None:
    case = on_cpu(LINEAR_CASES[0])
    inputs, target = case.data()
    eager = case.losses[EAGER]

    def wrong(x: Tensor, head: Tensor, t: Tensor) -> Tensor:
        return eager(x, head.detach() + 2 * (head - head.detach()), t)

    with pytest.raises(ArithmeticError, match="off by 0, 1 of its norm"):
        checked(case, "", {EAGER: eager, OURS: wrong}, inputs, target)


def test_half_of_the_rows_are_ignored() -> None:
    (case, *_) = (case for case in LINEAR_CASES if "none ignored" in case.losses)
    small = replace(case, shape=(10, 5), classes=7)
    (input, head), target = small.data()
    assert (target == -100).sum() == 5
    all_count = small.losses["none ignored"](input, head, target)
    expected = torch.nn.functional.cross_entropy(input @ head.T, target.clamp(min=0))
    torch.testing.assert_close(all_count, expected)


def test_measured_linear_case() -> None:
    """Its row has the operations, and the peers' times or why there are none."""
    case = next(case for case in CUDA_CASES if case.classes)
    eager = case.losses[EAGER]

    def failing(*_: Tensor) -> Tensor:
        raise RuntimeError("too many classes")

    def clock(calls: dict[str, Timed], _: str) -> Times:
        return Times({name: [2.0 if name == "CCE" else 1.0] for name in calls})

    peers = {"CCE": eager, "QuACK": failing}
    ((row, *_),) = measure(on_cpu(case), clock, False, peers, {"Liger": "not installed (liger_kernel)"})
    assert set(row.seconds) == {*case.losses, "CCE"} and row.speedup("CCE") == 2
    assert row.missing == {"Liger": "not installed (liger_kernel)", "QuACK": "RuntimeError: too many classes"}
    assert row.flops == 6 * 3 * 5 * 7 and row.bytes == 0
    assert row.input_bytes == (3 * 5 + 7 * 5) * case.dtype.itemsize
    assert [verdict for _, verdict in row.verdicts(None)] == ["met", "not measured", "not measured", "met"]


@pytest.mark.parametrize("case", LINEAR_CASES[:1], ids=lambda case: case.name)
def test_products_take_what_a_linear_loss_takes(case: Case) -> None:
    """Their operations are those that the case counts, so that no row counts more than what the least takes."""
    inputs, target = on_cpu(case).data()
    with FlopCounterMode(display=False) as counted:
        gradients(case.losses["products"], inputs, target)
    assert counted.get_total_flops() == on_cpu(case).flops
