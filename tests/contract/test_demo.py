"""The examples: a few steps of the demo, and the step of a large vocabulary within its budget."""

import subprocess
import sys

import pytest
from compiler import ROOT


@pytest.mark.deep("the demo, a few steps of it; what it shows is in the other tests", minutes=1)
def test_the_demo_compares_both_sides(tmp_path):
    picture = tmp_path / "demo.png"
    script = ROOT / "examples" / "demo.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--picture", str(picture)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fusedloss ") >= 3 and picture.stat().st_size > 10_000


@pytest.mark.deep("a training step of 128,256 tokens; smaller ones are in the other tests", minutes=0.2)
def test_a_step_of_a_large_vocabulary_stays_within_its_budget():
    script = ROOT / "examples" / "large_vocabulary.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fused: cpu")
