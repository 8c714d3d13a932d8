"""Ratios, verdicts and what fails a run, from figures made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from .results import COPY, EAGER, INPUT, OURS, Goal, Results, Row, Times, file_name, files
from .table import RESULTS, tables

ROW = Row(
    "mse-fp32-10",
    "forward + backward",
    passes=2,
    elements=10,
    element_bytes=4,
    seconds={EAGER: 2.0, OURS: 1.0},
    goals=[Goal(EAGER, 3), Goal(INPUT, most=1.05), Goal("compile", 1.2)],
    other_bytes=40,
    peak={EAGER: 80, OURS: 40},
)


def test_a_slow_round_cancels_out_of_a_ratio() -> None:
    times = Times({EAGER: [2.0, 20.0, 4.0], OURS: [1.0, 10.0, 1.0]})
    assert times.speedup(OURS, EAGER) == 2.0 and times.speedup(OURS, "compile") is None


def test_verdicts() -> None:
    assert [verdict for _, verdict in ROW.verdicts(None)] == ["MISSED", "met", "not measured"]
    assert ROW.unmet(None) == ["mse-fp32-10, forward + backward: 3x eager MISSED, reached 2.00"]
    assert replace(ROW, speedups={EAGER: 3.1}).unmet(None) == []  # the ratio by round is the one that counts
    greedy = replace(ROW, peak={OURS: 43})
    assert [verdict for _, verdict in greedy.verdicts(None)] == ["MISSED", "MISSED", "not measured"]


def test_a_busy_machine_is_not_judged_by_times() -> None:
    busy = replace(ROW, quiet=False)
    assert [verdict for _, verdict in busy.verdicts(None)] == ["not judged", "met", "not measured"]
    assert len(busy.unmet(None)) == 1


def test_operations_and_memory_of_a_linear_loss() -> None:
    linear = replace(ROW, passes=0, other_bytes=0, flops=6_000_000_000_000, peak={EAGER: 3_000_080, OURS: 1_000_040})
    assert linear.bytes == 0 and linear.flops_per_second() == 2 * linear.flops_per_second(EAGER) == 6e12
    assert linear.beside_gradients(EAGER) == 3_000_040 and linear.beside_gradients(OURS) == 1_000_000
    by_bytes, by_operations = tables([linear, ROW], None).split("\n\n")
    assert "bytes counted" in by_bytes and "TFLOP" not in by_bytes
    assert "6 TFLOP" in by_operations and "fused 1, eager 3 MB" in by_operations and "bytes" not in by_operations


def test_bytes_count_the_target() -> None:
    assert ROW.bytes == 120 and ROW.bandwidth() == 120 and ROW.bandwidth(EAGER) == 60


def test_share_of_a_copy() -> None:
    """80 of 120 bytes are a copy's, which takes half the time: three quarters of its bandwidth."""
    copied = replace(ROW, copy_seconds=0.5)
    assert copied.share_of_copy() == 0.75
    assert replace(copied, speedups={COPY: 0.4}).share_of_copy() == pytest.approx(0.6)  # the ratio by round counts
    assert ROW.share_of_copy() is None and replace(copied, passes=0, other_bytes=0).share_of_copy() is None
    assert replace(copied, copy_seconds=5e-6).share_of_copy() is None


CPU = {"device": "Intel Xeon", "instruction set": "AVX512", "threads": "2"}


def test_files_of_a_machine(tmp_path: Path) -> None:
    gpu = {"device": "NVIDIA H100 80GB HBM3"}
    assert (file_name(CPU), file_name(gpu)) == ("intel-xeon-avx512-2-threads.json", "nvidia-h100-80gb-hbm3.json")
    row = replace(ROW, family="elements", copy_seconds=0.5)
    for machine in (CPU, gpu):
        Results(machine, 1e9, [row]).write(tmp_path / file_name(machine))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "intel-xeon-avx512-demo.json").write_text("{}")
    for cpu, machine in ((True, CPU), (False, gpu)):
        (path,) = files(tmp_path, cpu)
        assert path.name == file_name(machine) and Results.read(path) == Results(machine, 1e9, [row])
    assert json.loads(path.read_text())["rows"][0]["derived"]["share of a copy"] == 0.75


def test_files_from_before_a_field_are_read() -> None:
    """The committed ones of GPUs have no family."""
    for path in files(RESULTS, cpu=False):
        assert all(row.family == "" and row.share_of_copy() is None for row in Results.read(path).rows)
