"""The tables of docs/performance.md: made from results alone, without a GPU, and never out of step with them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import ROOT

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

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


def run(document: Path, results: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.table", "--document", str(document), "--results", str(results)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "imaginary-1.json").write_text(json.dumps(RESULTS))
    return folder


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def test_the_table_says_what_the_results_say(document, results):
    done = run(document, results)
    assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "### Imaginary 1\n" in text and "B = 4000 GB/s. driver 1.2, revision abc" in text
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
    assert "- Liger: not installed (liger_kernel) (cross-entropy bf16 1000 x 1000 forward + backward)\n" in text


def test_a_second_run_changes_nothing(document, results):
    run(document, results)
    once = document.read_text()
    assert run(document, results).returncode == 0 and document.read_text() == once


def test_written_results_are_read_back(tmp_path, monkeypatch, results):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.results import Results

    read = Results.read(results / "imaginary-1.json")
    read.write(tmp_path / "folder" / "again.json")
    assert Results.read(tmp_path / "folder" / "again.json") == read
    derived = json.loads((tmp_path / "folder" / "again.json").read_text())["rows"][0]["derived"]
    assert derived["bytes"] == 6_000_000 and derived["share of B"] == 0.75 and derived["speedups"]["eager"] == 3.5
    assert derived["verdicts"]["90 % of B"] == "MISSED"


@pytest.mark.parametrize("text", ["no markers", f"{END} {BEGIN}", f"{BEGIN} {END} {END}", f"{BEGIN} {BEGIN} {END}"])
def test_a_document_without_its_markers_is_left_alone(document, results, text):
    document.write_text(text)
    done = run(document, results)
    assert done.returncode != 0 and "expected <!-- results: begin -->" in done.stderr
    assert document.read_text() == text


def test_the_document_is_in_step_with_the_results(tmp_path):
    copy = shutil.copy(ROOT / "docs" / "performance.md", tmp_path / "performance.md")
    assert run(copy, ROOT / "benchmarks" / "results").returncode == 0
    assert Path(copy).read_text() == (ROOT / "docs" / "performance.md").read_text()
