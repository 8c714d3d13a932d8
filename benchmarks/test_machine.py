"""The name of a processor."""

from pathlib import Path

import pytest

from .machine import _processor


@pytest.mark.parametrize(
    ("model", "device"),
    [
        ("Intel(R) Xeon(R) Processor", "Intel Xeon"),
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "Intel Xeon Platinum 8488C"),
        ("AMD EPYC 9R14 96-Core Processor", "AMD EPYC 9R14"),
    ],
)
def test_processor(model: str, device: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: {model}\nstepping\t: 2\npower management:\n\n"
        "processor\t: 1\nmodel name\t: another\n"
    )
    assert _processor(tmp_path / "cpuinfo") == {"device": device, "family": "6", "model": "207", "stepping": "2"}


def test_no_cpuinfo(tmp_path: Path) -> None:
    assert set(_processor(tmp_path / "missing")) == {"device"}
