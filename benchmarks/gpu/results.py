"""The figures of a run and what follows from them. No torch, so that a table can be made of them anywhere."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "fusedloss"


@dataclass(frozen=True)
class Goal:
    """Over "copy": a least share of the copy bandwidth; over a peer: a least speed-up."""

    over: str
    least: float

    def __str__(self) -> str:
        return f"{100 * self.least:.0f} % of B" if self.over == "copy" else f"{self.least:g}x {self.over}"


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

    @property
    def bytes(self) -> int:
        return self.passes * self.elements * self.element_bytes

    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds[OURS]

    def speedup(self, over: str) -> float | None:
        return self.seconds[over] / self.seconds[OURS] if over in self.seconds else None

    def reached(self, goal: Goal, copy_bandwidth: float) -> float | None:
        return self.bandwidth() / copy_bandwidth if goal.over == "copy" else self.speedup(goal.over)

    def verdicts(self, copy_bandwidth: float) -> Iterator[tuple[Goal, str]]:
        """Each goal "met", "MISSED", or "not measured" where the peer has no figure."""
        for goal in self.goals:
            reached = self.reached(goal, copy_bandwidth)
            yield goal, "not measured" if reached is None else "met" if reached >= goal.least else "MISSED"


@dataclass(frozen=True)
class Results:
    """A run on one machine; B, the copy bandwidth, counts bytes read and bytes written."""

    machine: dict[str, str]
    copy_bandwidth: float
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
                derived["share of B"] = row.bandwidth() / self.copy_bandwidth
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
