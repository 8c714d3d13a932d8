"""The cases of the GPU at a size for the CPU: what they call is right, and every pass of them can be called."""

from dataclasses import replace

import pytest
import torch

from .case import BACKWARD, Case
from .cases import CPU_CASES, cuda_cases
from .measure import checked
from .results import EAGER, OURS

CUDA_CASES = list(cuda_cases(quick=False))


def on_cpu(case: Case) -> Case:
    shape = (64,) if len(case.shape) == 1 else (3, 5, *(2 for _ in case.shape[2:]))
    return replace(case, shape=shape, device="cpu")


@pytest.mark.parametrize("cases", [CPU_CASES, CUDA_CASES], ids=["cpu", "cuda"])
def test_names_are_unique(cases: list[Case]) -> None:
    assert len({case.name for case in cases}) == len(cases)


def test_quick_is_a_part_of_all() -> None:
    quick = {case.name for case in cuda_cases(quick=True)}
    assert quick < {case.name for case in CUDA_CASES}


@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_cuda_case(case: Case) -> None:
    small = on_cpu(case)
    input, target = small.data()
    assert input.dtype == case.dtype and input.shape == small.shape
    for timed, timing in small.timed.items():
        losses = {**small.losses, OURS: timing.fused or small.losses[OURS]}
        calls, notes = checked(small, timed, losses, input, target)
        assert set(calls) == {EAGER, OURS} and not notes
        for call in calls.values():
            first = call.call()
            assert all(torch.isfinite(value).all() for value in (first if isinstance(first, tuple) else (first,)))
            if timed == BACKWARD:
                call.call()  # the graph is kept, so that backward alone can be timed again


def test_a_wrong_gradient_of_ours_raises() -> None:
    case = on_cpu(next(case for case in CUDA_CASES if case.name.startswith("huber")))
    input, target = case.data()
    eager = case.losses[EAGER]

    def wrong(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 2 * eager(x, t)

    with pytest.raises(ArithmeticError, match="off by 1 of its norm"):
        checked(case, "", {EAGER: eager, OURS: wrong}, input, target)
    calls, notes = checked(case, "", {EAGER: eager, "Liger": wrong}, input, target)
    assert set(calls) == {EAGER} and "off by 1 of its norm" in notes["Liger"]
