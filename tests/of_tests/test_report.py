"""The documents' tables and pictures: made from result files alone, without torch, and never out of step with them."""

import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from xml.etree import ElementTree

import pytest
from compiler import ROOT

from benchmarks.report.committed import Committed
from benchmarks.report.documents import names, rewritten, without_blocks
from benchmarks.results import Results
from benchmarks.table import render

PICTURES = ["bandwidth", "crossover", "memory", "speed", "step"]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from benchmarks.report.__main__ import main; sys.exit(main())"

# 3 passes over 1000 x 1000 elements of 2 bytes in 2 us are 3 TB/s, three quarters of B.
BOTH = {
    "case": "cross-entropy bf16 1000 x 1000",
    "timed": "forward + backward",
    "passes": 3,
    "elements": 1_000_000,
    "element_bytes": 2,
    "seconds": {"fused": 2e-6, "eager": 7e-6, "compile": 2.2e-6},
    "spread": {"fused": 1e-8, "eager": 1e-8, "compile": 1e-8},
    "missing": {"Liger": "not installed (liger_kernel)"},
    "goals": [
        {"over": "copy", "least": 0.9},
        {"over": "eager", "least": 3},
        {"over": "compile", "least": 1.2},
        {"over": "Liger", "least": 1},
    ],
}
CALL = {
    **BOTH,
    "case": "Huber fp32 64",
    "timed": "a call, forward + backward",
    "passes": 0,
    "seconds": {"fused": 2e-3, "eager": 2.5e-3},
    "missing": {},
    "goals": [{"over": "eager", "least": 1}],
}
RESULTS = {
    "machine": {"device": "Imaginary 1", "driver": "1.2", "revision": "abc"},
    "copy_bandwidth": 4e12,
    "rows": [BOTH, CALL],
    "skipped": {"Huber fp32 268435456": "skipped: needs 9 GB, 1 GB are free"},
}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "imaginary-1.json"
    path.write_text(json.dumps(RESULTS))
    return path


def report(*arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copied(tmp_path):
    """The arguments for copies of the documents and of the results."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("site"))
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    return "--root", tmp_path, "--results", tmp_path / "results"


def test_documents_and_pictures_are_in_step_with_the_results():
    done = report("--check")
    assert done.returncode == 0, done.stderr


def test_another_figure_is_told_and_then_written(tmp_path, copied):
    for path in (tmp_path / "results" / "examples").glob("*-demo.json"):
        measured = json.loads(path.read_text())
        measured["figures"][0]["sides"]["torch"]["step_ms"] = 987.65
        path.write_text(json.dumps(measured))
    done = report("--check", *copied)
    assert done.returncode == 1
    assert "docs/performance.md is not" in done.stderr and "docs/step.svg is not" in done.stderr
    assert "README.md" not in done.stderr and "docs/speed.svg" not in done.stderr
    assert report(*copied).returncode == 0
    assert "987.65" in (tmp_path / "docs" / "performance.md").read_text()
    assert "988 ms" in (tmp_path / "docs" / "step.svg").read_text()
    done = report("--check", *copied)
    assert done.returncode == 0, done.stderr


def test_a_figure_changed_by_hand_is_told(tmp_path, copied):
    readme = tmp_path / "README.md"
    text = readme.read_text()
    block = text.index("<!-- report: six cases -->")
    readme.write_text(text[:block] + re.sub(r"\d\.\dx", "99.9x", text[block:], count=1))
    done = report("--check", *copied)
    assert done.returncode == 1 and done.stderr.count("is not what") == 1 and "README.md is not" in done.stderr


def test_a_missing_file_is_named(tmp_path, copied):
    for path in (tmp_path / "results" / "examples").glob("*-pages.json"):
        path.unlink()
    done = report(*copied)
    assert done.returncode != 0 and "*-pages.json, found none: make measure" in done.stderr


def test_a_block_that_no_document_has_is_named(tmp_path, copied):
    readme = tmp_path / "README.md"
    readme.write_text(without_blocks(readme.read_text()))
    done = report(*copied)
    assert done.returncode != 0 and "found none named gpu sentence, six cases" in done.stderr


def test_the_bytes_of_a_sharded_step_are_what_the_code_says():
    from benchmarks.sharded_scale import lines

    figures = Committed().of("sharded-scale").figures
    assert figures["lines"] == lines(figures["rows"], figures["classes"]), "make measure"


def test_blocks_of_a_document():
    document = "a\n<!-- report: b -->\nold\n<!-- end of report -->\nc\n<!-- report: d -->\n<!-- end of report -->\n"
    assert names(document) == ["b", "d"]
    assert without_blocks(document) == "a\n\n\n\nc\n\n\n"
    once = rewritten(document, {"b": "new", "d": "more"})
    assert once.startswith("a\n<!-- report: b -->\n\nnew\n\n<!-- end of report -->\nc\n") and "more" in once
    assert rewritten(once, {"b": "new", "d": "more"}) == once
    with pytest.raises(ValueError, match="expected blocks named b, found d"):
        rewritten(document, {"b": "new"})


BEGIN, END = "<!-- report: b -->", "<!-- end of report -->"


@pytest.mark.parametrize("text", [BEGIN, END, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_markers_without_their_other_half_are_refused(text):
    with pytest.raises(ValueError, match="expected pairs of"):
        names(text)


def test_the_table_of_a_gpu_says_what_its_results_say(results):
    text = render([Results.read(results)])
    assert text.startswith("### Imaginary 1\n") and "B = 4000 GB/s. driver 1.2, revision abc" in text
    header, rule, both, call = (line for line in text.splitlines() if line.startswith("|"))
    assert header.count("|") == rule.count("|") == both.count("|") == call.count("|")
    cells = dict(zip(map(str.strip, header.split("|")), map(str.strip, both.split("|")), strict=True))
    assert cells["bytes counted"] == "3 x 1000000 x 2 = 0.01 GB"
    assert (cells["time"], cells["GB/s"], cells["of B"]) == ("2.0 us", "3000", "75 %")
    assert (cells["over eager"], cells["over compile"], cells["over Liger"]) == ("3.50x", "1.10x", "-")
    assert cells["goals"] == "90 % of B **MISSED**, 3x eager met, 1.2x compile **MISSED**, 1x Liger not measured"
    cells = dict(zip(map(str.strip, header.split("|")), map(str.strip, call.split("|")), strict=True))
    assert (cells["time"], cells["GB/s"], cells["over eager"]) == ("2.000 ms", "-", "1.25x")
    assert cells["goals"] == "1x eager met"
    assert "- Huber fp32 268435456: skipped: needs 9 GB, 1 GB are free\n" in text
    assert text.endswith("- Liger: not installed (liger_kernel) (cross-entropy bf16 1000 x 1000 forward + backward)")


def test_written_results_are_read_back(tmp_path, results):
    read = Results.read(results)
    read.write(tmp_path / "folder" / "again.json")
    assert Results.read(tmp_path / "folder" / "again.json") == read
    derived = json.loads((tmp_path / "folder" / "again.json").read_text())["rows"][0]["derived"]
    assert derived["bytes"] == 6_000_000 and derived["share of B"] == 0.75 and derived["speedups"]["eager"] == 3.5
    assert derived["verdicts"]["90 % of B"] == "MISSED"


class Text:
    """Words of a picture and about the room they take, in pixels."""

    def __init__(self, element):
        self.words = element.text
        x, y, width = float(element.get("x")), float(element.get("y")), 6.5 * len(self.words)
        self.left = x - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
        self.right, self.top, self.bottom = self.left + width, y - 10, y + 3

    def meets(self, other):
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@pytest.mark.parametrize("name", PICTURES)
def test_no_words_of_a_picture_meet_or_leave_it(name):
    picture = ElementTree.fromstring((ROOT / "docs" / f"{name}.svg").read_text())
    texts = [Text(element) for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert len(texts) > 10
    assert [(a.words, b.words) for a, b in combinations(texts, 2) if a.meets(b)] == []
    width, height = float(picture.get("width")), float(picture.get("height"))
    assert [each.words for each in texts if each.left < 0 or each.right > width or each.bottom > height] == []


@pytest.mark.parametrize("name", PICTURES)
def test_every_colour_of_a_picture_has_one_for_dark_pages(name):
    light, dark = (ROOT / "docs" / f"{name}.svg").read_text().split("@media (prefers-color-scheme: dark)")
    colours = r"([\w.-]+)\s*\{[^}]*(?:fill|stroke): #"
    assert set(re.findall(colours, light)) == set(re.findall(colours, dark)) >= {"text", ".page", ".eager", ".fused"}
    drawn = {each for kinds in re.findall(r'class="([^"]*)"', dark) for each in kinds.split()}
    told = set(re.findall(r"\.([a-z-]+)(?= )", light))
    assert drawn <= told
