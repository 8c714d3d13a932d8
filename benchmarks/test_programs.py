"""The programs of one subject, at sizes of a test: what they write has all that the report reads."""

import json
from pathlib import Path

import pytest

from . import adoption, linear_memory, pages
from .figures import write
from .results import EAGER, OURS


def test_figures_are_written_with_the_machine(tmp_path: Path) -> None:
    write(None, {"a": 1})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "folder" / "file.json", {"a": 1})
    read = json.loads((tmp_path / "folder" / "file.json").read_text())
    assert read["figures"] == {"a": 1} and {"device", "threads", "torch", "date", "revision"} <= set(read["machine"])


def test_new_memory_has_faults_and_warm_memory_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "COPY", 1 << 23)  # 32 MB: glibc maps and unmaps it each time
    monkeypatch.setattr(pages, "ROWS", 4)
    found = pages.measured(rounds=3)
    assert set(found) == set(pages.NAMES)
    assert found["copy into new memory"]["faults"] > 10 > found["copy into warm memory"]["faults"]


def test_an_allocator_that_is_missing_is_skipped() -> None:
    assert pages.under({"LD_PRELOAD": "no_such_library"}, 1) == {"skipped": "no_such_library is not installed"}


def test_calls_are_timed_on_every_side() -> None:
    found = adoption.measured(rounds=1)
    assert len(found) == 2
    assert all(set(sides) == set(adoption.SIDES) and min(sides.values()) > 0 for sides in found.values())


def test_digits_of_a_linear_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_memory, "DIGITS", (300, 32, 500))
    float32, bfloat16 = linear_memory.digits().values()
    for name in (EAGER, OURS):
        assert all(0 < a < 1e-5 < b < 0.02 for a, b in zip(float32[name], bfloat16[name], strict=True))
