"""torch's own samples and checks of its losses; samples.py says what is checked, and runs all of them by itself."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

SAMPLES = Path(__file__).with_name("samples.py")
NEEDED = ("expecttest", "numpy")  # by torch.testing._internal
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@needs_extension
@on_cpu_alone("makes its samples on the CPU")
@pytest.mark.skipif(bool(MISSING), reason=f"torch's samples need {', '.join(MISSING)}")
@pytest.mark.deep(
    "torch's samples of its losses, 8 s to import; the other tests of contract/ and compiled/ have their kinds",
    minutes=0.5,
)
def test_torchs_samples_pass_torchs_checks():
    # A number without factors in common with the loops that make the samples: all kinds of samples occur.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SAMPLES), "23"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
