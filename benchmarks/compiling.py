"""torch.compile's work for many cases, done before anything is timed: one process a core fills inductor's cache.

A case takes 2 CPU-seconds, most of them in the C++ compiler, and from the cache a tenth of a second.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

import torch

from .case import Case
from .cases import CALLS, cpu_cases
from .machine import cores
from .measure import compiled, gradients
from .results import EAGER, OURS


def ahead(cases: Sequence[Case], threads: Sequence[int]) -> None:
    """Few cases are not worth processes that import torch."""
    names = [case.name for case in cases if case.compiled]
    processes = min(cores(), len(names) // 3)
    alone()
    if processes < 2:
        return
    began = time.perf_counter()
    print(f"torch.compile compiles {len(names)} losses in {processes} processes", end="", flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), alone) as pool:
        for _ in pool.map(partial(_compile, threads=tuple(threads)), names):
            pass
    print(f": {time.perf_counter() - began:.0f} s")


def alone() -> None:
    """Inductor's own processes would start, and wait, while something is timed."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1


def _compile(name: str, threads: tuple[int, ...]) -> None:
    case = _cases()[name]
    torch._dynamo.reset()
    loss = compiled(case)
    inputs, target = case.data()
    for count in threads if case.family == CALLS else (max(threads),):
        torch.set_num_threads(count)
        try:
            case.losses[EAGER](*inputs, target)  # what it keeps for later calls is no part of the compilation
            case.losses[OURS](*inputs, target)  # compiles a loss of one's own
            gradients(loss, inputs, target)
        except Exception:  # what fails here fails where it is measured, and is written down there
            return


@cache
def _cases() -> dict[str, Case]:
    return {case.name: case for case in cpu_cases(quick=False)}
