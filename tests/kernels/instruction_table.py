"""tests/kernels/instructions.txt: what the kernels take for an element, beside what the memory's speed leaves.

The budget of an element is what a GPU can issue while its memory moves the bytes of the element; the share is that of
the memory's speed that a kernel can reach, as far as instructions go. That is arithmetic: a kernel gets there only if
no scheduler ever waits. What binds a kernel above its target is written into the table by hand, and kept.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import instructions
import whole_kernel

TABLE = Path(__file__).with_name("instructions.txt")
# Bytes a second that a copy has measured, by GPU; both have 132 multiprocessors that issue for 4 warps at 1.98 GHz.
SPEEDS = {"H100": 3.0e12, "H200": 4.3e12}
ISSUED = 132 * 4 * 32 * 1.98e9  # thread-instructions a second
HEAD = """\
Thread-instructions an element, counted as tests/kernels/instructions.py says, of the sources that registers.txt names.
Budget: what 132 multiprocessors issue at 1.98 GHz, 4 warps a cycle each, while the memory moves an element's bytes at
{speeds}. Share: of that speed, as far as instructions go.
"""
NOTHING = "-"
UNKNOWN = "?"

Loops = dict[str, tuple[float, ...]]  # of a kernel, by architecture
Wholes = dict[str, float]  # of a kernel at a number of classes


@dataclass
class Counts:
    loops: Loops = field(default_factory=dict)
    wholes: Wholes = field(default_factory=dict)
    binds: dict[str, str] = field(default_factory=dict)


def place(kernel: str, classes: int) -> str:
    return f"{kernel} of {classes} classes" if classes else kernel


def targets() -> dict[str, int]:
    return {place(kernel, n): most for kernel, of in whole_kernel.TARGETS.items() for n, most in of.items()}


def budget(moved: int, gpu: str) -> float:
    return ISSUED / (SPEEDS[gpu] / moved)


def of_memory(kernel: str, count: float) -> list[str]:
    """The bytes of an element, the budget on each GPU, and the share."""
    moved = instructions.moved(kernel)
    if moved is None:
        return [NOTHING] * (1 + 2 * len(SPEEDS))
    budgets = [budget(moved, gpu) for gpu in SPEEDS]
    return [str(moved), *(f"{most:.1f}" for most in budgets), *(f"{min(1, most / count):.0%}" for most in budgets)]


def table(counts: Counts, architectures: Sequence[str]) -> str:
    memory = ["bytes", *SPEEDS, *(f"share {gpu}" for gpu in SPEEDS)]
    decisive = architectures.index(whole_kernel.ARCHITECTURE)
    loops = [["hot loops", *architectures, *memory]]
    for name, row in counts.loops.items():
        loops.append([name, *(f"{count:.2f}" for count in row), *of_memory(name, row[decisive])])
    wholes = [["whole kernel", whole_kernel.ARCHITECTURE, "target", *memory, "what binds"]]
    for name, most in targets().items():
        count = counts.wholes.get(name, math.nan)
        binds = counts.binds.get(name, UNKNOWN) if count > most else NOTHING
        wholes.append([name, f"{count:.2f}", str(most), *of_memory(name.partition(" of ")[0], count), binds])
    speeds = " or ".join(f"{speed / 1e12} TB/s ({gpu})" for gpu, speed in SPEEDS.items())
    return HEAD.format(speeds=speeds) + "\n" + _aligned(wholes) + "\n" + _aligned(loops)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns at least two spaces apart, the first one and words to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        if rows[0][-1] == "what binds":
            cells[-1] = row[-1]
        lines.append("  ".join([f"{row[0]:{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines) + "\n"


def read(text: str) -> Counts:
    counts = Counts()
    _, wholes, loops = (part.splitlines()[1:] for part in text.rstrip("\n").split("\n\n"))
    of_memory = 1 + 2 * len(SPEEDS)  # cells
    for line in wholes:
        name, count, _, *rest = re.split(r"  +", line, maxsplit=3 + of_memory)
        counts.wholes[name] = float(count)
        counts.binds[name] = rest[-1]
    for line in loops:
        name, *cells = re.split(r"  +", line)
        counts.loops[name] = tuple(float(cell) for cell in cells[:-of_memory])
    return counts


def unexplained(counts: Counts) -> list[str]:
    """What takes more than its target, with nobody having written what binds; and what was not counted."""
    over = {name: most for name, most in targets().items() if not counts.wholes.get(name, math.nan) <= most}
    return [
        f"{name}: {counts.wholes.get(name, math.nan)} instructions, at most {most} wanted"
        for name, most in over.items()
        if counts.binds.get(name, UNKNOWN) in (UNKNOWN, NOTHING)
    ]


def flattened(counts: Counts) -> Mapping[str, object]:
    """Every count by a name of its own, to compare two tables."""
    return {**counts.loops, **{f"whole kernel, {name}": count for name, count in counts.wholes.items()}}
