"""The examples: a few steps of the demo, a large vocabulary within its budget, and a head over four processes."""

import os
import subprocess
import sys

import pytest
import torch
from compiler import ROOT
from marks import on_cpu_alone


@pytest.mark.deep("the demo, a few steps of it; what it shows is in the other tests", minutes=1)
def test_the_demo_compares_both_sides(tmp_path):
    picture = tmp_path / "demo.png"
    script = ROOT / "examples" / "demo.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--picture", str(picture)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout.count("fusedloss ") >= 3 and picture.stat().st_size > 10_000


@pytest.mark.deep("a training step of 128,256 tokens; smaller ones are in the other tests", minutes=0.2)
def test_a_step_of_a_large_vocabulary_stays_within_its_budget():
    script = ROOT / "examples" / "large_vocabulary.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fused: cpu")


@pytest.mark.deep("a transformer with a sharded head on 4 processes; its losses are in the other tests", minutes=0.5)
@on_cpu_alone("the processes meet over gloo and compute on the CPU")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_sharded_head_trains_as_in_one_process():
    script = ROOT / "examples" / "sharded_head.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--steps", "12"], env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "apart on 4 ranks" in done.stdout
