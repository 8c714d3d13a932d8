"""Forward and backward of every case: a group of pytest-benchmark for each, one row per provider."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .case import Case
from .results import EAGER, OURS, Row, Times


def test_speed(
    case: Case,
    provider: str,
    measured: Callable[[Case], tuple[Row, Times]],
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
) -> None:
    """pytest-benchmark shows the samples taken in turn; it times nothing itself."""
    row, times = measured(case)
    if provider in row.missing:
        pytest.fail(f"{provider}: {row.missing[provider]}")
    benchmark.group = case.name
    benchmark.extra_info.update(
        {
            "speedup_vs_eager": times.speedup(provider, EAGER),
            "speedup_vs_compile": times.speedup(provider, "compile"),
            **({"TFLOP/s": row.flops_per_second(provider) / 1e12} if row.flops else {}),
            **({"GB/s": row.bandwidth(provider) / 1e9} if row.bytes else {}),
            "peak MB": row.peak[provider] / 1e6,
        }
    )
    benchmark.pedantic(lambda: None)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.stats.stats.data = list(times.rounds[provider])

    if provider == OURS and pytestconfig.getoption("--enforce"):
        assert not row.unmet(None)
