"""Every block of Python in the documents runs, and prints what the document says."""

import doctest
import re
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


@needs_extension
@on_cpu_alone("the documents name no device")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run_as_they_stand(path: Path) -> None:
    """Those of a document in one namespace, which has torch and fusedloss."""
    names = {"torch": torch, "fusedloss": fusedloss}
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for number, block in enumerate(BLOCK.findall(path.read_text())):
        if ">>>" in block:
            examples = doctest.DocTestParser().get_doctest(
                block, names, f"{path.name}, block {number}", str(path), None
            )
            runner.run(examples, said.append, clear_globs=False)
            names = examples.globs
        else:
            exec(compile(block, f"{path.name}, block {number}", "exec"), names)
    assert said == []
