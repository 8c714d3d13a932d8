"""The demo, a few steps of it: three trainings on either side, their curves compared, a picture."""

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
