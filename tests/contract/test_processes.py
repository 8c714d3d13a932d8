"""Losses in more than one process: gloo, forks, and what one process leaves to another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

RANKS = Path(__file__).with_name("ranks.py")


@needs_extension
@on_cpu_alone("the processes meet over gloo and compute on the CPU")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.deep(
    "two processes of DDP, FSDP2 and DTensor; everywhere/ has DataParallel, subclasses and copies", minutes=0.5
)
def test_two_processes_train_as_with_torchs_losses(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
