"""What other processes leave of the machine."""

from time import perf_counter, process_time

import psutil  # type: ignore[import-untyped]


class Load:
    """Counts from where it is made."""

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
