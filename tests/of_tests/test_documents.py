"""What the documents say holds: their blocks run, their links lead somewhere, their commands and files are there."""

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
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "README.md"])
# Those of CONTRIBUTING.md are recipes, which test_recipes.py runs.
DOCUMENTS = [path for path in PAGES if path.name != "CONTRIBUTING.md" and BLOCK.search(path.read_text())]
CODE = re.compile(r"^```.*?^```|`[^`]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


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


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    return broken


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    assert {page.name: broken for page in PAGES if (broken := broken_links(page))} == {}


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n[here](#a-page), [gone](gone.md), [no heading](#b), `[code](code)`\n")
    assert broken_links(page) == ["gone.md", "#b"]


def test_what_make_is_told_to_is_a_target() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(), re.MULTILINE)}
    assert {"test", "docs"} <= told and told <= targets


def test_the_drawing_of_a_call_names_files_that_are_there() -> None:
    files = re.findall(r'class="file"[^>]*>([^<]*/[^<]*)<', (ROOT / "docs" / "call.svg").read_text())
    assert len(files) > 10 and [name for name in files if not (ROOT / name).exists()] == []
