"""The example that needs another package's trainer."""

import subprocess
import sys

import pytest
from clients import needs
from compiler import ROOT
from marks import needs_extension, on_cpu_alone


@needs_extension
@on_cpu_alone("the example trains on the CPU")
@needs("transformers", "accelerate")
@pytest.mark.deep("an example of the Trainer, a few steps of it", minutes=0.5)
def test_the_trainer_of_transformers():
    script = ROOT / "examples" / "transformers_trainer.py"
    done = subprocess.run([sys.executable, str(script), "--steps", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "patched, transformers.loss.loss_utils.fixed_cross_entropy: 3 fused, 0 native" in done.stdout
