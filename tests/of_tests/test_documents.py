"""Every block of Python in the documents runs, and prints what the document says."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

import fusedloss

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(path.read_text())
]


def run_in_two(script: Path, text: str) -> None:
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_extension
@on_cpu_alone("the documents name no device")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run_as_they_stand(path: Path, tmp_path: Path) -> None:
    """Those of a document in one namespace, which has torch and fusedloss; one for torchrun in two processes."""
    names = {"torch": torch, "fusedloss": fusedloss}
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for number, block in enumerate(BLOCK.findall(path.read_text())):
        if block.startswith("# torchrun"):
            run_in_two(tmp_path / "example.py", block)
        elif ">>>" in block:
            examples = doctest.DocTestParser().get_doctest(
                block, names, f"{path.name}, block {number}", str(path), None
            )
            runner.run(examples, out=said.append, clear_globs=False)
            names = examples.globs
        else:
            exec(compile(block, f"{path.name}, block {number}", "exec"), names)
    assert said == []
