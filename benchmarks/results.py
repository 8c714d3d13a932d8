"""The figures of a run and what follows from them. No torch, so that a table can be made of them anywhere.

A GPU has a file <gpu>.json in the folder of results, a CPU one for each thread count, <cpu>-<n>-threads.json.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

OURS, EAGER = "fused", "eager"
COPY, INPUT = "copy", "input"
OF_A_CPU = "-threads.json"
SHORT_COPY = 1e-5  # seconds: a shorter one tells what a call costs


@dataclass(frozen=True)
class Times:
    """Seconds for one call by each provider: entry i of every list was taken in round i."""

    rounds: dict[str, list[float]]
    quiet: bool = True  # whether the providers had all their threads' cores to themselves

    def seconds(self, name: str) -> float:
        return median(self.rounds[name])

    def spread(self, name: str) -> float:
        """The width of the middle half."""
        if len(self.rounds[name]) < 2:
            return 0.0
        first, _, third = quantiles(self.rounds[name], n=4)
        return third - first

    def speedup(self, name: str, over: str) -> float | None:
        """The median of the ratios within the rounds: what slows a whole round cancels out."""
        if over not in self.rounds:
            return None
        return median(base / own for base, own in zip(self.rounds[over], self.rounds[name], strict=True))


@dataclass(frozen=True)
class Goal:
    """Over "copy", a least share of the copy bandwidth; over "input", the most memory in multiples of the input's
    bytes; over a provider, a least speed-up."""

    over: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.most is not None:
            return f"memory {self.most:g}x {self.over}"
        return f"{100 * (self.least or 0):.0f} % of B" if self.over == COPY else f"{self.least:.3g}x {self.over}"

    def met(self, reached: float) -> bool:
        return reached >= (self.least or 0) and (self.most is None or reached <= self.most)


@dataclass(frozen=True)
class Row:
    """One pass of one case. Seconds are medians of a call, spreads what half of the calls lie within."""

    case: str
    timed: str  # forward, backward, ...
    passes: int  # over the elements, counted as read or written once; 0 where the cost of a call is what counts
    elements: int
    element_bytes: int
    seconds: dict[str, float]  # by provider
    spread: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # provider: why it has no figure
    goals: list[Goal] = field(default_factory=list)
    other_bytes: int = 0  # of targets and statistics, where they count
    speedups: dict[str, float] = field(default_factory=dict)  # ours over each provider and over a copy, by round
    peak: dict[str, int] = field(default_factory=dict)  # bytes that a provider allocates, where that is measured
    quiet: bool = True
    flops: int = 0  # of a linear loss, whose cost is its matrix products
    family: str = ""  # names the table that the row belongs to
    copy_seconds: float | None = None  # on a CPU: a copy_ of the inputs into warm memory, in turn with the providers

    @property
    def bytes(self) -> int:
        return self.passes * self.input_bytes + self.other_bytes

    def bandwidth(self, provider: str = OURS) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds[provider]

    def flops_per_second(self, provider: str = OURS) -> float:
        return self.flops / self.seconds[provider]

    def speedup(self, over: str) -> float | None:
        """Over a provider, or a copy, without ratios by round, the ratio of the medians."""
        if over in self.speedups:
            return self.speedups[over]
        if over == COPY:
            return self.copy_seconds and self.copy_seconds / self.seconds[OURS]
        return self.seconds[over] / self.seconds[OURS] if over in self.seconds else None

    def share_of_copy(self) -> float | None:
        """The bandwidth reached over that of a copy of the inputs, by round; None where the cost of a call counts."""
        faster = self.speedup(COPY)
        if faster is None or not self.bytes or (self.copy_seconds or 0) < SHORT_COPY:
            return None
        return faster * self.bytes / (2 * self.input_bytes)

    @property
    def input_bytes(self) -> int:
        """Of what a gradient is taken of, and so of the gradients too."""
        return self.elements * self.element_bytes

    def memory(self) -> float | None:
        """Our peak in multiples of the input's bytes."""
        return self.peak[OURS] / self.input_bytes if self.peak else None

    def beside_gradients(self, provider: str) -> int:
        """Bytes of a provider's peak beyond the inputs and the gradients of them."""
        return self.peak[provider] - self.input_bytes

    def reached(self, goal: Goal, copy_bandwidth: float | None) -> float | None:
        if goal.over == COPY:
            return self.bandwidth() / copy_bandwidth if copy_bandwidth else None
        return self.memory() if goal.over == INPUT else self.speedup(goal.over)

    def verdicts(self, copy_bandwidth: float | None) -> Iterator[tuple[Goal, str]]:
        """Each goal "met" or "MISSED", "not measured" without a figure, "not judged" for times of a busy machine."""
        for goal in self.goals:
            reached = self.reached(goal, copy_bandwidth)
            if reached is None:
                yield goal, "not measured"
            elif not self.quiet and goal.over != INPUT:
                yield goal, "not judged"
            else:
                yield goal, "met" if goal.met(reached) else "MISSED"

    def unmet(self, copy_bandwidth: float | None) -> list[str]:
        """The goals that fail a run under --enforce, each with its verdict and what was reached."""
        return [
            f"{self.case}, {self.timed}: {goal} {verdict}, reached {self.reached(goal, copy_bandwidth) or 0:.2f}"
            for goal, verdict in self.verdicts(copy_bandwidth)
            if verdict not in ("met", "not measured")
        ]


@dataclass(frozen=True)
class Results:
    """A run on one machine; B, the bandwidth of a large copy, counts bytes read and bytes written."""

    machine: dict[str, str]
    copy_bandwidth: float | None
    rows: list[Row]
    skipped: dict[str, str] = field(default_factory=dict)  # case: why

    def write(self, path: Path) -> None:
        """With what follows from the figures, for those who read the file."""
        rows = []
        for row in self.rows:
            derived: dict[str, Any] = {
                "bytes": row.bytes,
                "speedups": {name: row.speedup(name) for name in row.seconds if name != OURS},
                "verdicts": {str(goal): verdict for goal, verdict in row.verdicts(self.copy_bandwidth)},
            }
            if row.bytes:
                derived["GB/s"] = row.bandwidth() / 1e9
                if self.copy_bandwidth:
                    derived["share of B"] = row.bandwidth() / self.copy_bandwidth
            if (share := row.share_of_copy()) is not None:
                derived["share of a copy"] = share
            if row.flops:
                derived["TFLOP/s"] = row.flops_per_second() / 1e12
                derived["bytes beside gradients"] = {name: row.beside_gradients(name) for name in row.peak}
            rows.append({**asdict(row), "derived": derived})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**asdict(self), "rows": rows}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        given = json.loads(path.read_text())
        rows = []
        for row in given["rows"]:
            row.pop("derived", None)
            row["goals"] = [Goal(**goal) for goal in row["goals"]]
            rows.append(Row(**row))
        return cls(given["machine"], given["copy_bandwidth"], rows, given["skipped"])


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def file_name(machine: dict[str, str]) -> str:
    """Of the run that these facts were written of."""
    if "threads" not in machine:
        return f"{slug(machine['device'])}.json"
    return f"{slug(machine['device'] + ' ' + machine['instruction set'])}-{machine['threads']}{OF_A_CPU}"


def files(folder: Path, cpu: bool) -> list[Path]:
    """The results that lie directly in the folder, of CPUs or of GPUs."""
    return [path for path in sorted(folder.glob("*.json")) if path.name.endswith(OF_A_CPU) == cpu]
