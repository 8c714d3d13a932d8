"""python -m fusedloss run script.py: what the script imports becomes fused, and it ends as it would have ended."""

import subprocess
import sys
from pathlib import Path

import pytest
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

pytestmark = on_cpu_alone("another process")
PLACE = "torch.nn.functional.cross_entropy"
LOSS = "torch.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))"
REPORT = f"fusedloss: {PLACE}: 1 fused, 0 native\n"


def run(tmp_path: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, "-m", "fusedloss", "run", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def package(folder: Path, name: str, text: str) -> None:
    for part in name.split("."):
        folder = folder / part
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / "__init__.py").write_text(text)


@needs_extension
def test_a_script_runs_as_it_is(tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'")
    text = (
        "import sys, threading, torch, beside\n"
        "if __name__ == '__main__':\n"
        "    started = threading.Event()\n"
        f"    threading.Thread(target=lambda: (started.wait(), print({LOSS}.item()))).start()\n"
        "    print(sys.argv[1:], beside.name, 'timm' in sys.modules)\n"
        "    threading.Timer(0.1, started.set).start()  # the thread outlives the script's last line\n"
        "    sys.exit(3)\n"
    )
    ran = run(tmp_path, text, "--epochs", "2")
    assert ran.stdout == "['--epochs', '2'] beside False\n1.3862943649291992\n"
    assert ran.returncode == 3
    assert ran.stderr == REPORT


@needs_extension
def test_other_packages_are_fused_as_they_are_imported(tmp_path):
    """Modules of their names: what the packages themselves compute is in clients/."""
    focal = (
        "def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction='none'):\n    raise AssertionError\n"
    )
    package(tmp_path, "torchvision.ops", "from .focal_loss import sigmoid_focal_loss\n")
    (tmp_path / "torchvision" / "ops" / "focal_loss.py").write_text(focal)
    package(
        tmp_path,
        "timm.loss",
        "class SoftTargetCrossEntropy:\n"
        "    def forward(self, x, target):\n        raise AssertionError\n"
        "class LabelSmoothingCrossEntropy:\n"
        "    def forward(self, x, target):\n        raise AssertionError\n",
    )
    text = (
        "import importlib.util, sys, torch\n"
        "assert importlib.util.find_spec('timm.loss')  # looks, and does not import\n"
        "from torchvision.ops import sigmoid_focal_loss\n"
        "from timm.loss import SoftTargetCrossEntropy\n"
        "x = torch.zeros(2, 4)\n"
        "sigmoid_focal_loss(x, x)\n"
        "SoftTargetCrossEntropy().forward(x, x.softmax(1))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    ran = run(tmp_path, text)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == (
        "fusedloss: torchvision.ops.focal_loss.sigmoid_focal_loss: 1 fused, 0 native\n"
        "timm.loss.SoftTargetCrossEntropy.forward: 1 fused, 0 native\n"
        "not in the installed version: timm.loss.BinaryCrossEntropy.forward\n"
    )


@needs_extension
@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("raise KeyError('no such key')", "KeyError: 'no such key'\n"),
        pytest.param(
            "sys.exit('a message')", "a message\n", marks=pytest.mark.deep("one more process; sys.exit(3) above")
        ),
    ],
)
def test_a_script_that_fails_is_told_and_reported(tmp_path, end, told):
    ran = run(tmp_path, f"import sys, torch\n{LOSS}\n{end}\n")
    assert ran.returncode == 1
    assert ran.stderr.endswith(told + REPORT)


def test_a_script_that_is_not_there():
    command = [sys.executable, "-m", "fusedloss", "run", "no_such.py"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 2 and ran.stderr.endswith("fusedloss: no file no_such.py\n")
