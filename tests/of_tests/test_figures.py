"""No figure of a measurement stands in a document by hand: it comes from a committed file, in a marked block."""

import re

import pytest
from compiler import ROOT

from benchmarks.report.documents import without_blocks

NUMBER = r"(?<![\w.,-])~?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
UNIT = (
    r"(?:[num]?s|µs|(?:micro|milli)?seconds?|minutes?|hours?|[kMGT]i?B(?:/s)?|bytes|[GT]FLOPS?(?:/s)?"
    r"|times|-?fold|%|percent)"
)
FIGURE = re.compile(rf"{NUMBER}(?:\s*(?:to|and|or|/|against|-)\s*{NUMBER})?(?:x|[\s-]?{UNIT})(?![\w(])")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")  # of a run
# What the code defines or arithmetic gives, as it stands in the documents.
ALLOWED = [
    r"\d+ bytes a (?:row|class)",
    r"16 bytes for forward",  # of a row's target and statistics
    r"at most 134 MB beside the gradients, 67 MB in",  # fusedloss/linear/_sizes.py
    r"more than 1 MB",  # fusedloss/parallel/_exchange.py
    r"a copy of 64 MB",  # benchmarks/pages.py
    r"each page, 4 kB",  # of the system
    r"every 2 MB",  # a huge page
    r"0 times infinity",
    r'"0\.8x products": at most 1\.25 times',  # benchmarks/cases.py
]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def anywhere(words):
    """Their pattern, wherever a line ends."""
    return re.compile(words.replace(" ", r"\s+"))


def figures(document: str) -> list[str]:
    """Each with its line, outside of the blocks and of what is allowed."""
    allowed = re.compile("|".join(anywhere(each).pattern for each in ALLOWED))
    lines = allowed.sub(lambda found: "\n" * found[0].count("\n"), without_blocks(document)).splitlines()
    return [f"line {i}: {found[0]}" for i, line in enumerate(lines, 1) for find in (FIGURE, DATE)
            for found in find.finditer(line)]  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_figure_is_typed_by_hand(path):
    assert figures(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    ["took 137 ms", "3.5us", "9.2x", "1.19x as fast", "14 against 98 ms", "4 to 5 % of it", "262 / 77 MiB", "3 minutes",
     "608 MB beside", "0.92 to 1.01 times as long", "2.4 GB/s", "on 2026-11-21", "a 3-fold", "12 GFLOP", "1,000 s"],
)  # fmt: skip
def test_figures_are_found(text):
    assert len(figures(f"It {text}.\n")) == 1
    assert figures(f"<!-- report: a -->\nIt {text}.\n<!-- end of report -->\n") == []


@pytest.mark.parametrize("text", ["3 x 4", "N = 12", "(512, 32000)", "AVX2", "8 bytes a row", "24 N (P - 1)", "6NDV"])
def test_what_is_no_figure_is_left(text):
    assert figures(text) == []


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_is_allowed_stands_somewhere(allowed):
    assert any(anywhere(allowed).search(path.read_text()) for path in DOCUMENTS), f"nothing is {allowed}: take it out"
