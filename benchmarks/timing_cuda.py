"""Times on a GPU: the device's own with a cold cache, by events, or a whole call's, by the host's clock."""

from statistics import median
from time import perf_counter

import torch

from .case import CALL, Timed
from .results import Times

WARM_UPS = 3
SPIN_CYCLES = 2_000_000  # about 1 ms: by then the host has submitted what is timed, and its own time is not in it


class ColdCache:
    """Fills the second-level cache with other data by reading it.

    Written data would have to leave the cache while the next kernel is timed: up to 50 MB on an H200.
    """

    def __init__(self) -> None:
        size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 256 << 20)
        self._data = torch.ones(size // 4, device="cuda")

    def __call__(self) -> None:
        self._data.amax()


class CudaClock:
    """Times a whole call by the host's clock where its cost is what counts, all else by the device's events."""

    def __init__(self, rounds: int, cold: ColdCache) -> None:
        self._rounds, self._cold = rounds, cold

    def __call__(self, calls: dict[str, Timed], timed: str) -> Times:
        host = timed == CALL
        return Times(on_host(calls, self._rounds) if host else on_device(calls, self._rounds, self._cold))


def on_device(calls: dict[str, Timed], rounds: int, cold: ColdCache) -> dict[str, list[float]]:
    """Seconds of each call in each round, the calls in turn."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for number in range(WARM_UPS + rounds):
        for name, timed in calls.items():
            if timed.before is not None:
                timed.before()
            cold()
            torch.cuda._sleep(SPIN_CYCLES)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            timed.call()
            end.record()
            if number >= WARM_UPS:
                events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) * 1e-3 for begin, end in pairs] for name, pairs in events.items()}


def on_host(calls: dict[str, Timed], rounds: int, loops: int = 500) -> dict[str, list[float]]:
    """Seconds a call takes where hundreds follow each other, the calls in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UPS + rounds):
        for name, timed in calls.items():
            torch.cuda.synchronize()
            begin = perf_counter()
            for _ in range(loops):
                timed.call()
            torch.cuda.synchronize()
            if number >= WARM_UPS:
                seconds[name].append((perf_counter() - begin) / loops)
    return seconds


def copy_bandwidth(rounds: int, cold: ColdCache) -> float:
    """B: bytes read and written a second by a copy within the device."""
    size = min(2 << 30, torch.cuda.mem_get_info()[0] // 8)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(source)
    samples = on_device({"copy": Timed(lambda: copy.copy_(source))}, rounds, cold)["copy"]
    return 2 * size / median(samples)
