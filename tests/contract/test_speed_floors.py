"""No driver became much slower beside eager torch: benchmarks/guard.py, which also says how a floor comes about."""

import subprocess
import sys

import pytest
from compiler import ROOT
from marks import needs_extension


@needs_extension
@pytest.mark.on_cpu_alone("times of the CPU; make gpu measures a GPU")
@pytest.mark.deep("speed beside eager torch, 10 CPU-seconds; benchmarks/ measures it in full")
def test_every_driver_reaches_its_floor():
    guard = [sys.executable, "-m", "benchmarks.guard"]
    done = subprocess.run(guard, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("not judged"):
        pytest.skip(done.stdout)
