"""Times of several functions that can be compared although the machine is shared."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from timeit import Timer

from load import Load

Call = Callable[[], object]

SAMPLE_SECONDS = 2e-3  # a shorter sample would measure the clock and the scheduler
BLOCK_SECONDS = 0.25  # the operating system counts processor time in steps of 10 ms
LEAST_ROUNDS = 9


@dataclass(frozen=True)
class Times:
    """Seconds for one call of each function: entry i of every list was taken in round i."""

    loops: dict[str, int]
    rounds: dict[str, list[float]]
    quiet: bool  # whether the functions had all their threads' cores to themselves

    def seconds(self, name: str) -> float:
        return median(self.rounds[name])

    def speedup(self, name: str, over: str) -> float:
        """The median of the ratios within the rounds: what slows a whole round cancels out."""
        return median(base / own for base, own in zip(self.rounds[over], self.rounds[name], strict=True))


def in_turn(calls: dict[str, Call], threads: int, seconds: float = 2.0, patience: float = 8.0) -> Times:
    """Run the functions one after another, again and again, until quiet rounds fill the seconds or patience ends.

    What the function before left in the caches would be counted here: 1.5 times a call's time after one that writes
    many tensors. So a sample starts with a call that is not timed, and every round has an order of its own.

    Where another process holds a core, each parallel region waits for the scheduler (4 ms and more) and a ratio only
    counts regions. Such rounds are left out, unless there are hardly any others.
    """
    loops = {name: _loops(call) for name, call in calls.items()}
    shuffle = random.Random(0)
    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    quiet_seconds = 0.0
    start = perf_counter()
    while (quiet_seconds < seconds or len(quiet) < LEAST_ROUNDS) and perf_counter() - start < patience:
        load = Load()
        block = []
        while load.seconds() < BLOCK_SECONDS:
            order = shuffle.sample(list(calls), len(calls))
            block.append({name: _sample(calls[name], loops[name]) for name in order})
        if load.cores_left() >= threads - 0.15:
            quiet += block
            quiet_seconds += load.seconds()
        else:
            disturbed += block
    enough = len(quiet) >= LEAST_ROUNDS
    rounds = quiet if enough else quiet + disturbed
    return Times(loops, {name: [times[name] for times in rounds] for name in calls}, enough)


def rounds_within(seconds: float, round_seconds: float, least: int, most: int) -> int:
    return min(most, max(least, math.ceil(seconds / round_seconds)))


def _sample(call: Call, loops: int) -> float:
    call()
    return Timer(call).timeit(loops) / loops


def _loops(call: Call) -> int:
    """How many calls make a sample; the calls spent on finding out warm the function up."""
    loops = 1
    timer = Timer(call)
    timer.timeit(1)
    while timer.timeit(loops) < SAMPLE_SECONDS:
        loops *= 2
    return loops
