"""``python -m fusedloss bench``: a loss at a user's own shape."""

import re

import pytest
import torch
from marks import needs_extension, on_cpu_alone

from fusedloss import _bench
from fusedloss._bench import TARGETS, bench

pytestmark = on_cpu_alone("measures on the CPU; with --device cuda it needs a GPU that nothing else uses")


@needs_extension
@pytest.mark.parametrize("loss", TARGETS)
def test_it_measures_every_loss_beside_torchs(loss, capsys):
    assert bench(["--shape", "64,100", "--loss", loss, "--seconds", "0.01"]) == 0
    title, path, torchs, ours, moved = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{loss} of (64, 100) fp32, forward + backward of the mean, cpu")
    assert path.startswith("the call is fused: cpu")
    assert re.fullmatch(r"  torch +[\d.]+ [um]s   peak +[\d.]+ kB", torchs)
    assert re.fullmatch(r"  fusedloss +[\d.]+ [um]s   peak +[\d.]+ kB   [\d.]+ times as fast as torch, half .*", ours)
    indices = loss in ("cross_entropy", "nll_loss", "multi_margin_loss")
    assert moved.startswith(f"at least {51.2 + 0.512 if indices else 76.8:.3g} kB have to move")


@needs_extension
def test_the_speed_up_is_the_median_of_the_rounds(monkeypatch, capsys):
    rounds = {"torch": [4.0, 40.0, 4.0, 8.0, 4.0], "fusedloss": [2.0, 20.0, 1.0, 1.0, 2.0]}
    monkeypatch.setattr(_bench, "_in_turn", lambda calls, device, seconds: rounds)
    bench(["--shape", "4,10", "--dtype", "bf16"])
    assert "2.00 times as fast as torch" in capsys.readouterr().out


@needs_extension
def test_it_measures_torch_compile_on_request(capsys):
    assert bench(["--shape", "8,10", "--compile", "--seconds", "0.01", "--loss", "mse_loss"]) == 0
    assert "\n  torch.compile " in capsys.readouterr().out


def test_without_the_extension_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(_bench, "extension", None)
    monkeypatch.setattr(_bench, "why_native", "no kernels")
    assert bench(["--shape", "8,10"]) == 1
    assert capsys.readouterr().out == "fusedloss runs natively here: no kernels\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: --shape"),
        (["--shape", "4,0"], "sizes must be positive, got 4,0"),
        (["--shape", "4,x"], "invalid _shape value: '4,x'"),
        (["--shape", "4", "--loss", "dice"], "invalid choice: 'dice'"),
        (["--shape", "4", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_what_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        bench(arguments)
    assert words in capsys.readouterr().err


@needs_extension
def test_classes_need_rows():
    with pytest.raises(SystemExit, match=r"cross_entropy needs a shape of rows and classes, .* got \(10,\)"):
        bench(["--shape", "10"])


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
