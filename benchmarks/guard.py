"""Fails where a driver became slower: ``python -m benchmarks.guard``, which make test-rest runs.

For each driver one case runs fused and eager in turn, with one thread. The median of the rounds' ratios is held against
a floor of about 60 % of the least that was measured when floors were written. The process's own time counts, so that
others who use the cores hardly matter. A disturbed machine gets three attempts, of which the best counts; a kernel that
takes twice as long misses its floor each time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

import torch

from fusedloss._library import extension, why_native

from . import machine
from .case import Case
from .cases import (
    cpu_timed,
    cross_entropy,
    distillation,
    focal,
    linear_cross_entropy,
    of_rows,
    pointwise,
    sigmoid_focal_indexed,
)
from .losses import LINEAR
from .measure import gradients
from .results import EAGER, OURS
from .timing_cpu import LEAST_ROUNDS, plan, sample

FLOORS = Path(__file__).parent / "floors.json"
SHARE = 0.6
ATTEMPTS = 3
SECONDS = 0.25  # of a case


def cases() -> Iterator[Case]:
    """Small enough to take a millisecond a call, and so that a call's overhead does not count."""
    fp32, bf16, timed = torch.float32, torch.bfloat16, cpu_timed(0)
    yield cross_entropy((64, 32000))
    yield cross_entropy((64, 32000), bf16)
    yield cross_entropy((1024, 1000))
    yield cross_entropy((20_000, 10))
    yield cross_entropy((1, 21, 256, 256))
    yield focal((1024, 1000), 0)
    yield pointwise("huber", 1 << 20, fp32, timed)
    yield pointwise("bce_with_logits", 1 << 20, bf16, timed)
    yield sigmoid_focal_indexed((10_000, 80), 0)
    yield of_rows("cosine_embedding", (4000, 256), timed)
    yield distillation((1000, 1000), fp32)
    yield linear_cross_entropy((256, 128), 8000, fp32, [], LINEAR)
    yield cross_entropy((4, 10))


def ratio(case: Case) -> float:
    """How many times as fast as eager."""
    inputs, target = case.data()
    eager, ours = (partial(gradients, case.losses[name], inputs, target) for name in (EAGER, OURS))
    plans = {call: plan(call, process_time) for call in (eager, ours)}
    rounds: list[float] = []
    end = process_time() + SECONDS
    while process_time() < end or len(rounds) < LEAST_ROUNDS:
        rounds.append(sample(eager, *plans[eager], process_time) / sample(ours, *plans[ours], process_time))
    return median(rounds)


def best(measure: Callable[[], float], floor: float) -> float:
    """The best of three attempts, or the first that reaches the floor."""
    reached = 0.0
    for _ in range(ATTEMPTS):
        if (reached := max(reached, measure())) >= floor:
            break
    return reached


def check(floors: dict[str, float], measure: Callable[[Case], float] = ratio) -> list[str]:
    """What is too slow. Each case must have a floor, and each floor its case."""
    every = list(cases())
    if {case.name for case in every} != set(floors):
        return [f"the cases of {FLOORS.name} are not those of {Path(__file__).name}: write it anew with --write"]
    slow = []
    for case in every:
        floor = floors[case.name]
        reached = best(partial(measure, case), floor)
        line = f"{case.name:40} {reached:6.2f}x eager, at least {floor:.2f}x"
        print(line, flush=True)
        if reached < floor:
            slow.append(line)
    return slow


def written() -> dict[str, float]:
    return {case.name: round(SHARE * min(ratio(case) for _ in range(ATTEMPTS)), 2) for case in cases()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"measure anew, into {FLOORS.name}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.write:
        FLOORS.write_text(json.dumps({"machine": machine.facts("cpu"), "floors": written()}, indent=1) + "\n")
        return 0
    if extension is None:
        print(f"nothing can be measured: {why_native}", file=sys.stderr)
        return 1
    committed = json.loads(FLOORS.read_text())
    theirs, here = (
        f"{facts['device']}, {facts['instruction set']}" for facts in (committed["machine"], machine.facts("cpu"))
    )
    if theirs != here:
        print(f"not judged: the floors are of {theirs}, and here is {here}")
        return 0
    if slow := check(committed["floors"]):
        print("too slow, in the best of three attempts:", *slow, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
