"""No call of a raw op, however broken, ends the process, writes where it should not, or gives a wrong number."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

pytestmark = [needs_extension, on_cpu_alone("a crash of the GPU's would end every later test")]
RAW_OPS = Path(__file__).with_name("raw_ops.py")


def fuzz(*options: str) -> None:
    """In a process of its own, which may crash."""
    ran = subprocess.run(
        [sys.executable, str(RAW_OPS), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    printed = re.sub(r"\d+\r", "", ran.stdout)
    assert ran.returncode == 0, f"{ran.stdout.split(chr(13))[-2:]}\n{printed}\n{ran.stderr[-2000:]}"


def test_some_calls():
    fuzz("--calls", "800", "--seed", "2500")  # of which two found a fault of its day


@pytest.mark.deep("random calls of the raw ops, a minute of them; 800 ran", minutes=1)
def test_many_calls():
    fuzz("--seconds", "60", "--seed", "1000000")
