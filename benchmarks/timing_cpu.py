"""Times on a CPU of several functions that can be compared although the machine is shared."""

import random
from collections.abc import Callable
from time import perf_counter, process_time
from timeit import Timer

import psutil  # type: ignore[import-untyped]
import torch

from .case import Call, Timed
from .results import Times

SAMPLE_SECONDS = 2e-3  # a shorter sample would measure the clock and the scheduler
BLOCK_SECONDS = 0.2  # the operating system counts processor time in steps of 10 ms
SECONDS = 0.2
PATIENCE = 2  # times what a quiet machine takes
LEAST_ROUNDS = 5
SLOW_ROUNDS = 3  # where a round takes a tenth of a second and longer, by which the scheduler does not matter so much
SLOW_ROUND, SLOW_CALL = 0.1, 0.05


def in_turn(calls: dict[str, Call], threads: int, seconds: float = SECONDS) -> Times:
    """Run the functions one after another, again and again, until quiet rounds fill the seconds or patience ends.

    What the function before left in the caches would be counted here: 1.5 times a call's time after one that writes
    many tensors. So a sample starts with a call that is not timed, unless a call is so slow that it hardly matters, and
    every round has an order of its own.

    Where another process holds a core, each parallel region waits for the scheduler (4 ms and more) and a ratio only
    counts regions. Such rounds are left out, unless there are hardly any others.
    """
    plans = {name: plan(call) for name, call in calls.items()}
    round_seconds = sum(taken for _, taken in plans.values())
    least = LEAST_ROUNDS if round_seconds < SLOW_ROUND else SLOW_ROUNDS
    patience = PATIENCE * max(seconds, 2 * least * round_seconds)  # a sample may begin with a call more
    shuffle = random.Random(0)
    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    quiet_seconds = 0.0
    start = perf_counter()
    while (quiet_seconds < seconds or len(quiet) < least) and perf_counter() - start < patience:
        load = Load()
        block = []
        while load.seconds() < BLOCK_SECONDS:
            order = shuffle.sample(list(calls), len(calls))
            block.append({name: sample(calls[name], *plans[name]) for name in order})
        if load.cores_left() >= threads - 0.15:
            quiet += block
            quiet_seconds += load.seconds()
        else:
            disturbed += block
    enough = len(quiet) >= least
    rounds = quiet if enough else quiet + disturbed
    return Times({name: [times[name] for times in rounds] for name in calls}, enough)


def sample(call: Call, loops: int, expected: float, time: Callable[[], float] = perf_counter) -> float:
    if expected < SLOW_CALL:
        call()
    return Timer(call, timer=time).timeit(loops) / loops


def plan(call: Call, time: Callable[[], float] = perf_counter) -> tuple[int, float]:
    """How many calls make a sample, and its seconds; the calls spent on finding out warm the function up."""
    loops = 1
    timer = Timer(call, timer=time)
    timer.timeit(1)
    while (taken := timer.timeit(loops)) < SAMPLE_SECONDS:
        loops *= 2
    return loops, taken


def clock(calls: dict[str, Timed], timed: str, seconds: float = SECONDS) -> Times:
    return in_turn({name: one.call for name, one in calls.items()}, torch.get_num_threads(), seconds)


def copy_bandwidth(rounds: int = 20) -> float:
    """B: bytes read and written a second by a copy of 64 MB into memory that was written before."""
    source = torch.ones(1 << 24)
    copy = torch.zeros_like(source)
    taken = sorted(Timer(lambda: copy.copy_(source)).repeat(rounds, 1))
    return 2 * source.nbytes / taken[rounds // 2]


class Load:
    """What other processes leave of the machine, counted from where this is made."""

    def __init__(self) -> None:
        self._wall, self._own, self._idle = perf_counter(), process_time(), _idle()

    def seconds(self) -> float:
        return perf_counter() - self._wall

    def cores_left(self) -> float:
        """The cores that this process used or could have used since."""
        own, idle = process_time() - self._own, _idle() - self._idle
        return (own + idle) / self.seconds()


def _idle() -> float:
    times = psutil.cpu_times()
    return times.idle + getattr(times, "iowait", 0.0)
