"""The tables of a CPU on the terminal, from figures made up."""

from dataclasses import replace

import pytest

from . import terminal
from .cases import cpu_cases, cpu_sweeps
from .results import COPY, EAGER, OURS, Goal, Row

ROW = Row(
    "mse-fp32-4194304",
    "forward + backward",
    passes=2,
    elements=1 << 22,
    element_bytes=4,
    seconds={EAGER: 2.6e-3, OURS: 8.82e-4, "compile": 2.19e-3, "native": 8.82e-2},
    goals=[Goal(EAGER, 2), Goal("compile", 3)],
    other_bytes=1 << 24,
    peak={EAGER: 33_600_000, OURS: 16_800_000},
    speedups={EAGER: 3.0, "compile": 2.5, "native": 100.4, COPY: 0.5},
    family="elements",
    copy_seconds=1e-3,
)


def test_lines() -> None:
    row, more = terminal.lines(ROW, 2)
    assert row.split() == "mse-fp32-4194304 2 882 us 3.00x 2.50x 75 % 16.8 / 33.6".split()
    assert more == "    100x native"
    assert terminal.memory(replace(ROW, peak={EAGER: 131_000, OURS: 65_500})) == "0.07 / 0.13"
    assert terminal.memory(replace(ROW, peak={EAGER: 99_000, OURS: 65_500})) == ""


def test_a_table_for_each_family() -> None:
    seconds = {EAGER: 2e-5, OURS: 1e-5}
    small = replace(ROW, case="mse-fp32-64", family="calls", seconds=seconds, speedups={}, peak={EAGER: 8, OURS: 4})
    text = terminal.whole([(ROW, 1), (small, 1), (ROW, 2)])
    where = [text.index("\nelements\n"), text.index(ROW.case), text.index("\ncalls\n"), text.index(small.case)]
    assert where == sorted(where) and text.count(ROW.case + " ", 0, where[2]) == 2
    assert "goals: 3 met, 2 missed, 1 not measured" in text
    assert text.count("mse-fp32-4194304, forward + backward: 3x compile MISSED, reached 2.50") == 2
    assert terminal.BUSY not in text and terminal.BUSY in terminal.whole([(replace(ROW, quiet=False), 1)])


def test_100_columns() -> None:
    """With the longest name and the widest figures."""
    name = max((case.name for case in (*cpu_cases(False), *cpu_sweeps())), key=len)
    peak = {EAGER: 12_345_678_900, OURS: 12_345_678_900}
    wide = {EAGER: 123.4, "compile": 123.4, "native": 1e3, COPY: 1.234}
    row = replace(ROW, case=name, quiet=False, peak=peak, speedups=wide, missing={"compile": "why " * 99})
    text = terminal.whole([(row, 64)])
    assert max(map(len, text.splitlines())) <= terminal.WIDTH
    assert len(name) > terminal.COLUMNS[0][2] and f"\n{name}\n" in text and " 64 " in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.63e-5, "16.3 us"), (9.996e-6, "10.0 us"), (9.996e-4, "1.00 ms"), (0.188, "188 ms"), (1.371, "1.37 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text
