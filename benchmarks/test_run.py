"""A run that can measure nothing must fail and say why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .results import Results, files

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("benchmarks",),
        ("benchmarks", "--device", "cuda"),
        ("pytest", "benchmarks", "-k", "test_speed and huber-fp32-64"),
    ],
    ids=["program", "program on a GPU", "pytest"],
)
def test_without_the_extension(command: tuple[str, ...]) -> None:
    done = run(*command, FUSEDLOSS_DISABLE="1")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "without" in said and "extension: FUSEDLOSS_DISABLE=1" in said


def test_no_case_of_that_name() -> None:
    done = run("benchmarks", "--only", "no such loss")
    assert done.returncode == 1 and "no such loss" in done.stderr


def test_a_run_that_skips_all_fails() -> None:
    test = "benchmarks/test_sharded.py::test_a_step_takes_less_cpu_time_and_memory_than_loss_parallel"
    done = run("pytest", test, FUSEDLOSS_DISABLE="1")
    assert "1 skipped" in done.stdout and done.returncode == 1


def test_one_file_for_each_count_of_threads(tmp_path: Path) -> None:
    """A case of one call: all that a run does, but for torch.compile."""
    arguments = ("--only", "huber-fp32-64", "--no-compile", "--threads", "1", "2", "--seconds", "0.01")
    done = run("benchmarks", *arguments, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100 and "calls" in lines
    assert [line.split()[1] for line in lines if line.startswith("huber-fp32-64 ")] == ["1", "2"]
    found = [Results.read(path) for path in files(tmp_path, cpu=True)]
    assert [results.machine["threads"] for results in found] == ["1", "2"]
    assert all(results.copy_bandwidth and results.rows[0].copy_seconds for results in found)


def test_one_file_for_several_counts_is_refused(tmp_path: Path) -> None:
    done = run("benchmarks", "--threads", "1", "2", "--output", str(tmp_path / "one.json"))
    assert done.returncode == 2 and "must be a folder" in done.stderr
