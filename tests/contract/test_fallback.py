"""The package without its extension: the same results, natively, and a self-check that says so."""

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from compiler import ROOT
from marks import needs_extension

import fusedloss
from fusedloss.__main__ import devices, rows

in_other_ways = pytest.mark.deep("another process; the daily run has one that runs natively by accident")

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


def copied(folder: Path, record: str = "", extension: bool = False) -> None:
    """The package in another place, with what a build has left there."""
    source = Path(fusedloss.__file__).parent
    ignored = shutil.ignore_patterns("_C*.json", "__pycache__", *([] if extension else ["*.so"]))
    shutil.copytree(source, folder / "fusedloss", ignore=ignored)
    if record:
        (folder / "fusedloss" / f"_C{EXTENSION_SUFFIXES[0]}").with_suffix(".json").write_text(record)


def in_place(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def test_a_package_that_was_never_built_runs_natively(tmp_path):
    # The sources alone, in another place: no extension lies beside them.
    copied(tmp_path)
    built, values = results(tmp_path / "values", NO_EDITABLE, **in_place(tmp_path))
    assert not built and all(value.isfinite().all() for value in values)


WHY = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fusedloss
    import fusedloss.parallel
x = torch.zeros(2, 3)
assert all(each.filename == "<string>" for each in caught), "the line that imports"
print([str(each.message) for each in caught], fusedloss.explain(fusedloss.MSELoss(), x, x), sep="\\n")
"""


def told(**environment: str) -> list[str]:
    """The warnings of an import, and what explain says."""
    command = [sys.executable, "-c", NO_EDITABLE + WHY]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ('{"torch": "2.0.1+cu118"}', "built for torch 2.0.1+cu118, this is " + torch.__version__),
        pytest.param('{"reason": "the build failed: x"}', "the build failed: x", marks=in_other_ways),
        pytest.param("", "the extension is not built", marks=in_other_ways),
    ],
    ids=["another torch", "failed", "never"],
)
def test_why_it_runs_natively_is_told_once_where_nobody_chose_it(record, why, tmp_path):
    copied(tmp_path, record, extension="torch" in record)
    warned, explained = told(**in_place(tmp_path))
    assert warned.startswith(f"['fusedloss runs in native PyTorch: {why}") and warned.count("fusedloss runs") == 1
    assert explained.startswith(f"native: {why}")


@in_other_ways
def test_what_was_chosen_is_no_warning(tmp_path):
    assert told(FUSEDLOSS_DISABLE="1") == ["[]", "native: FUSEDLOSS_DISABLE=1"]
    why = "FUSEDLOSS_NO_EXTENSION=1 when it was built"
    copied(tmp_path, json.dumps({"reason": why}))
    assert told(**in_place(tmp_path)) == ["[]", f"native: {why}"]


@in_other_ways
def test_the_folder_of_sources_is_named_where_it_shadows_an_installed_copy(tmp_path):
    copied(tmp_path)
    (tmp_path / "setup.py").touch()
    warned, _ = told(**in_place(tmp_path))
    assert f"not built in {tmp_path / 'fusedloss'}, a folder of sources" in warned and "install" in warned


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
    assert max(map(len, done.stdout.splitlines())) <= 100
    disabled = self_check(FUSEDLOSS_DISABLE="1")
    assert disabled.returncode == 0 and "native PyTorch (FUSEDLOSS_DISABLE=1)" in disabled.stdout


def test_self_check_ends_with_its_reader():
    command = f"{sys.executable} -m fusedloss | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("fusedloss ") and not done.stderr


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
