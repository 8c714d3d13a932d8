"""The peak of what torch allocates on the CPU while a function runs."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes held at once by torch's CPU allocator beyond what it held before.

    The result of the call counts, because it is alive until the call returns. Memory that other code takes from the
    system is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    return max(accumulate((size for _, size in changes), initial=0))
