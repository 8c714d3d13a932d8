"""A run that can measure nothing must fail and say why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
