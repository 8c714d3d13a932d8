"""The committed result files: whole runs of CPUs and GPUs, and what single programs have measured."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..results import Results, Row, files
from ..table import RESULTS

# Families of a CPU run whose rows are one loss over many sizes: drawn, and left out of the tables.
BY_VOCABULARY, BY_SIZE = "by vocabulary", "by size"
SWEEPS = (BY_VOCABULARY, BY_SIZE)


@dataclass(frozen=True)
class Measured:
    """What a single program has measured, and on which machine."""

    machine: dict[str, str]
    figures: Any


class Committed:
    """The files of a folder, each read once."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    @cached_property
    def gpus(self) -> list[Results]:
        return [Results.read(path) for path in files(self.folder, cpu=False)]

    @cached_property
    def of_cpus(self) -> list[Results]:
        return [Results.read(path) for path in files(self.folder, cpu=True)]

    @property
    def cpus(self) -> list[Results]:
        """Runs of all families: the newest first, and of one day the one with most threads."""
        found = [run for run in self.of_cpus if not of_linear_losses(run)]
        return sorted(found, key=lambda run: (run.machine["date"], int(run.machine["threads"])), reverse=True)

    @property
    def cpu(self) -> Results:
        """The run that the README and the pictures show."""
        if not self.cpus:
            raise ValueError(f"expected the results of a CPU in {self.folder}, found none: make bench")
        return self.cpus[0]

    @property
    def linear(self) -> list[Results]:
        """Runs of a CPU with linear losses alone, of sizes that take seconds a call."""
        return [run for run in self.of_cpus if of_linear_losses(run)]

    def of(self, program: str) -> Measured:
        """The newest file that the program wrote: examples/<machine>-<program>.json."""
        paths = sorted((self.folder / "examples").glob(f"*-{program}.json"))
        if not paths:
            raise ValueError(f"expected {self.folder / 'examples'}/*-{program}.json, found none: make measure")
        found = [Measured(**json.loads(path.read_text())) for path in paths]
        return max(found, key=lambda each: each.machine["date"])


def of_linear_losses(run: Results) -> bool:
    return bool(run.rows) and all(row.flops for row in run.rows)


def family(run: Results, name: str) -> list[Row]:
    return [row for row in run.rows if row.family == name]


def row_of(run: Results, case: str) -> Row:
    """The row of a case outside of the sweeps."""
    for row in run.rows:
        if row.case == case and row.family not in SWEEPS:
            return row
    raise ValueError(f"expected the case {case} in the results of {run.machine['device']}, found none")


Block = Callable[[Committed], str]
