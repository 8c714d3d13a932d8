"""The package without its extension: the same results, natively, and a self-check that says so."""

import os
import subprocess
import sys

import torch
from compiler import ROOT
from marks import needs_extension

from fusedloss.__main__ import devices, rows

SCRIPT = """
import sys, torch, fusedloss, fusedloss.functional as L
from fusedloss._library import extension
torch.manual_seed(0)
x, y, t = torch.randn(40, 9, requires_grad=True), torch.randint(9, (40,)), torch.rand(40, 9)
y[3] = -100
alpha = torch.rand(9)
values = [
    fusedloss.CrossEntropyLoss(weight=alpha)(x, y), L.cross_entropy(x, y, reduction="none"),
    fusedloss.FocalLoss(alpha, 0.5)(x, y), L.focal_loss(x, y, 0.25, 2.0, reduction="none"),
    fusedloss.HuberLoss(delta=0.3)(x, t), L.huber_loss(x, t, "sum", weight=t),
    fusedloss.SigmoidFocalLoss()(x, t), L.sigmoid_focal_loss(x, t, -1, 0.5),
    fusedloss.SigmoidFocalLoss(weight=alpha)(x, y), L.sigmoid_focal_loss(x, y, reduction="mean", normalizer=3),
]
values += [torch.autograd.grad(v.sum(), x)[0] for v in values]
torch.save((extension is not None, [v.detach() for v in values]), sys.argv[1])
"""


# An editable install would find the extension beside the sources, past a copy of them without one.
NO_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]"


def results(path, before: str = "", **environment: str):
    command = [sys.executable, "-c", before + SCRIPT, str(path)]
    subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=300)
    return torch.load(path)


@needs_extension
def test_the_results_are_the_same_without_the_extension(tmp_path):
    fused, values = results(tmp_path / "fused")
    disabled, native_values = results(tmp_path / "native", FUSEDLOSS_DISABLE="1")
    assert fused and not disabled
    for value, native in zip(values, native_values, strict=True):
        torch.testing.assert_close(value, native)


def test_a_package_that_was_never_built_runs_natively(tmp_path):
    # The sources alone, in another place: no extension lies beside them.
    import shutil

    import fusedloss

    source = os.path.dirname(fusedloss.__file__)
    shutil.copytree(source, tmp_path / "fusedloss", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built, values = results(tmp_path / "values", NO_EDITABLE, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    assert not built and all(value.isfinite().all() for value in values)


def self_check(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fusedloss"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_self_check():
    done = self_check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") == len(list(rows())) * len(devices()) and "path:" in done.stdout
    disabled = self_check(FUSEDLOSS_DISABLE="1")
    assert disabled.returncode == 0 and "native PyTorch (FUSEDLOSS_DISABLE=1)" in disabled.stdout


def test_self_check_fails_where_a_loss_is_off(monkeypatch, capsys):
    from fusedloss import __main__ as program

    honest = program.LOSSES["huber"]
    off = honest._replace(routed=lambda *arguments: 1.001 * honest.routed(*arguments))
    monkeypatch.setitem(program.LOSSES, "huber", off)
    assert program.main() == 1
    assert capsys.readouterr().out.count("OFF") == len(devices())


@needs_extension
def test_a_first_call_in_inference_mode_does_not_decide_for_the_others():
    code = """
import torch, fusedloss
from losses import kernel
x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
with torch.inference_mode():
    fusedloss.CrossEntropyLoss()(x, y)
    fusedloss.CrossEntropyLoss()(torch.randn(3, 4), torch.tensor([0, 1, 2]))
assert kernel("cross_entropy")(x, y, None, "mean", -100) is not None
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
