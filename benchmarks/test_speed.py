"""Forward and backward of every case: a group of pytest-benchmark for each, one row per provider."""

from collections.abc import Callable

import pytest
from case import Case
from measure import Measured
from pytest_benchmark.fixture import BenchmarkFixture
from timing import rounds_within


def test_speed(
    case: Case,
    provider: str,
    measured: Callable[[Case], Measured],
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
) -> None:
    """pytest-benchmark times the providers apart from each other; the ratios were taken in turn."""
    measurement = measured(case)
    result, times = measurement.result, measurement.result.times
    loops = times.loops[provider]
    benchmark.group = case.name
    benchmark.extra_info.update(
        {
            "speedup_vs_eager": result.speedup(provider, "eager"),
            "speedup_vs_compile": result.speedup(provider, "compile"),
            "GB/s": result.bandwidth(provider) / 1e9,
            "peak MB": result.peak[provider] / 1e6,
        }
    )
    rounds = rounds_within(0.3, times.seconds(provider) * loops, 5, 50)
    benchmark.pedantic(measurement.calls[provider], rounds=rounds, iterations=loops)

    if provider == "fused" and pytestconfig.getoption("--enforce"):
        unmet = {goal: verdict for goal, verdict in result.goals().items() if not verdict.startswith("met")}
        assert not unmet, case.name
