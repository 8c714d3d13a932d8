"""No call of a function or a raw op, however broken, ends the process, writes where it should not, or is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

pytestmark = [needs_extension, on_cpu_alone("a crash of the GPU's would end every later test")]
FOLDER = Path(__file__).parent
each_program = pytest.mark.parametrize("program", ["raw_ops.py", "public.py"])


def fuzz(program: str, *options: str) -> None:
    """In a process of its own, which may crash."""
    command = [sys.executable, str(FOLDER / program), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    printed = re.sub(r"\d+\r", "", ran.stdout)
    assert ran.returncode == 0, f"{ran.stdout.split(chr(13))[-2:]}\n{printed}\n{ran.stderr[-2000:]}"


@each_program
def test_some_calls(program):
    fuzz(program, "--calls", "800", "--seed", "2500")


@each_program
@pytest.mark.deep("20,000 random calls of the functions, and of the raw ops; 800 ran", minutes=0.3)
def test_many_calls(program):
    fuzz(program, "--calls", "20000", "--seconds", "250", "--seed", "1000000")
