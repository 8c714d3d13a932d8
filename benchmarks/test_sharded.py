"""The step over a sharded vocabulary beside torch's, and what it sends at scale."""

import pytest

from . import sharded, sharded_scale


@pytest.mark.skipif(sharded.extension is None, reason="nothing to measure without the extension")
def test_a_step_takes_less_cpu_time_and_memory_than_loss_parallel(pytestconfig: pytest.Config) -> None:
    figures = sharded.run(rounds=5)
    ours, torchs = figures[sharded.OURS], figures[sharded.TORCHS]
    assert ours.peak <= sharded.SHARE_OF_MEMORY * torchs.peak
    assert not pytestconfig.getoption("--enforce") or torchs.cpu_ms >= sharded.TIMES_LESS_CPU * ours.cpu_ms


def test_many_ranks_receive_few_bytes() -> None:
    for ranks in sharded_scale.RANKS:
        ours, one_gather = sharded_scale.ours(16_384, ranks), sharded_scale.gathered(16_384, ranks, 3)
        assert ours.rounds <= 2 and ours.bytes <= one_gather.bytes + 40 * ranks
        assert ours.held <= 2e6
    assert [sharded_scale.ours(16_384, ranks).rounds for ranks in (8, 16)] == [1, 2]
