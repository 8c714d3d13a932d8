"""The tests of benchmarks/ but for its measurements: what it calls, counts, judges, writes and prints."""

import subprocess
import sys

import pytest
from compiler import ROOT
from marks import needs_extension


@needs_extension
@pytest.mark.on_cpu_alone("tests of the measurements, with few numbers")
@pytest.mark.deep("tests of what measures, 25 CPU-seconds; pytest benchmarks runs them too")
def test_benchmarks():
    left_out = [f"--ignore=benchmarks/test_{name}.py" for name in ("speed", "sharded")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks", *left_out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
