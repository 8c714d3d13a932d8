"""The examples of a few seconds, each as a user runs it; they check themselves what they claim."""

import runpy
import subprocess
import sys

import pytest
from compiler import ROOT
from marks import needs_compiler, needs_extension, on_cpu_alone

pytestmark = [
    pytest.mark.deep("the examples, some seconds each; what they use is in the other tests", minutes=0.1),
    on_cpu_alone("the examples train on the CPU"),
    needs_extension,
]
PICTURES = ["fine_tuning", "segmentation"]


def run(name: str, *arguments: str) -> int:
    script = ROOT / "examples" / f"{name}.py"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("name", ["detection_head", "mixed_precision", "reinforcement"])
def test_an_example(name, capsys):
    assert run(name) == 0
    assert "fused: cpu" in capsys.readouterr().out


def test_distillation():
    """It starts processes, each with a peak memory of its own."""
    command = [sys.executable, str(ROOT / "examples" / "distillation.py"), "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fused: cpu") == 2


@needs_compiler
def test_a_loss_of_ones_own():
    assert run("own_loss") == 0


@pytest.mark.parametrize("name", PICTURES)
def test_an_example_with_a_picture(name, tmp_path):
    picture = tmp_path / "picture.png"
    assert run(name, "--picture", str(picture)) == 0
    assert picture.stat().st_size > 10_000
