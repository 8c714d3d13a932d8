"""The executor itself: right kernels come out right in any order, and each planted mistake is seen."""

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiler import COMPILER, fingerprint
from marks import needs_compiler

SOURCE = Path(__file__).with_name("planted.cpp")
EXECUTOR = SOURCE.parent.parent / "kernels" / "cuda_on_cpu"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SEEDS = range(20)
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, LAUNCH_FAILURE = 0, 1, 9, 701, 719
NOT_SUPPORTED, INVALID_CLUSTER_SIZE = 801, 912

pytestmark = needs_compiler


@dataclass
class Result:
    value: float
    error: int
    fault: str


@dataclass
class Planted:
    plain: Path
    sanitized: Path

    def run(self, case: str, *numbers: int, seed: int = 0) -> Result:
        done = self._start(self.plain, case, numbers, seed)
        assert done.returncode == 0, done.stderr
        value, error, fault = done.stdout.split("\n", 2)
        return Result(float(value), int(error), fault.strip())

    def value(self, case: str, *numbers: int, seed: int = 0) -> float:
        result = self.run(case, *numbers, seed=seed)
        assert (result.error, result.fault) == (SUCCESS, "")
        return result.value

    def sanitizer_report(self, case: str, *numbers: int) -> str:
        """Empty where the sanitizers have nothing to say."""
        done = self._start(self.sanitized, case, numbers, seed=0)
        assert (done.returncode == 0) == (done.stderr == ""), done.stderr
        return done.stderr

    @staticmethod
    def _start(executable: Path, case: str, numbers: tuple[int, ...], seed: int) -> "subprocess.CompletedProcess[str]":
        command = [str(executable), str(seed), case, *map(str, numbers)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def planted(once: Callable[[str, Callable[[Path], None]], Path]) -> Planted:
    def build(folder: Path) -> None:
        def compile(name: str, flags: list[str]) -> None:
            command = [*COMPILER.split(), "-std=c++20", "-O1", *WARNINGS, *flags, f"-I{EXECUTOR}", str(SOURCE)]
            done = subprocess.run([*command, "-o", str(folder / name)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile, ["plain", "sanitized"], [[], SANITIZERS]))

    folder = once(f"planted-{fingerprint('', SOURCE, EXECUTOR)}", build)
    return Planted(folder / "plain", folder / "sanitized")


@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
@pytest.mark.parametrize("count", [1, 31, 33, 1001, 4099])
def test_block_sum_is_exact_in_any_order(planted: Planted, count: int, threads: int) -> None:
    for seed in range(3):
        assert planted.value("block sum", count, threads, seed=seed) == count * (count + 1) / 2


# without the barrier: with it, its numbers, what is right
BARRIERS = {
    "block sum without barrier": ("block sum", (1001, 256), 501501),
    "two block sums without barrier": ("two block sums", (), 0),
    "neighbours without barrier": ("neighbours", (), 0),
    "cluster sum without barrier before": ("cluster sum", (3,), 0),
    "cluster sum without barrier after": ("cluster sum", (3,), 0),
}


@pytest.mark.parametrize("without", BARRIERS)
def test_missing_barrier_gives_a_wrong_result_and_the_barrier_never_does(planted: Planted, without: str) -> None:
    case, numbers, right = BARRIERS[without]
    assert all(planted.value(case, *numbers, seed=seed) == right for seed in SEEDS)
    assert any(planted.value(without, *numbers, seed=seed) != right for seed in SEEDS)


@pytest.mark.parametrize("count", [1, 100, 1001])
@pytest.mark.parametrize("blocks", [1, 2, 9, 100])
def test_last_block_done_sum_is_exact_in_any_order_of_blocks(planted: Planted, count: int, blocks: int) -> None:
    for seed in range(3):
        assert planted.value("grid sum", count, blocks, seed=seed) == count * (count + 1) / 2


def test_blocks_run_in_an_order_that_the_seed_decides(planted: Planted) -> None:
    orders = [planted.value("block order", seed=seed) for seed in SEEDS]
    assert orders == [planted.value("block order", seed=seed) for seed in SEEDS]
    assert len(set(orders)) > len(SEEDS) / 2


def test_every_thread_of_a_three_dimensional_grid_of_clusters_runs_once(planted: Planted) -> None:
    assert planted.value("number threads") == 0


def test_missing_tail_leaves_elements_out(planted: Planted) -> None:
    assert planted.value("copy", 103, 0) == 0
    assert planted.value("copy without tail", 103, 0) == 3
    assert planted.value("copy without tail", 100, 0) == 0


def test_shared_memory_of_every_block_starts_as_nan(planted: Planted) -> None:
    assert planted.value("count nan", 5, 10) == 50


RIGHT = [
    ("block sum", 1001, 256),
    ("grid sum", 1001, 9),
    ("copy", 103, 0),
    ("cluster sum", 3),
    ("write shared", 64, 64),
]


@pytest.mark.parametrize("case", [*RIGHT, ("throw",), ("after a fault", 1001, 64), ("number threads",)], ids=str)
def test_sanitizers_are_silent_where_memory_is_used_rightly(planted: Planted, case: tuple[str, int]) -> None:
    assert planted.sanitizer_report(*case) == ""


@pytest.mark.parametrize(
    ("case", "report"),
    [
        (("copy beyond the end", 103, 0), "heap-buffer-overflow"),
        (("write shared", 64, 65), "heap-buffer-overflow"),
        (("write shared", 0, 1), "use-after-poison"),
        (("cluster sum without barrier after", 3), "use-after-poison"),
        (("copy", 103, 1), "misaligned address"),
    ],
    ids=str,
)
def test_sanitizers_see_wrong_use_of_memory(planted: Planted, case: tuple[str, int], report: str) -> None:
    assert report in planted.sanitizer_report(*case)


FAULTS = {
    "barrier or shuffle": "waits at shuffle_xor .* for thread .* which waits at __syncthreads",
    "barrier in two branches": "throws: __syncthreads .* while others wait at another",
    "shuffle without a lane": r"shuffle_xor .* for thread \(39, 0, 0\) of block .* which has exited",
    "shuffle in half a warp": "shuffle_xor .* for lanes that its warp does not have",
    "cluster barrier short": r"cluster_barrier .* for thread \(3, 0, 0\) of block \(1, 0, 0\), which has exited",
    "throw": r"thread \(5, 0, 0\) of block .* throws: planted",
    "share beyond the cluster": "throws: cluster_shared of a block that is not in the cluster",
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_hangs_or_is_undefined_is_a_fault_that_names_the_thread(planted: Planted, case: str) -> None:
    for seed in range(5):
        result = planted.run(case, seed=seed)
        assert result.error == LAUNCH_FAILURE
        assert re.match(r"thread \(\d+, 0, 0\) of block \([01], 0, 0\) ", result.fault)
        assert re.search(FAULTS[case], result.fault), result.fault


def test_barriers_within_a_block_do_not_wait_for_exited_threads(planted: Planted) -> None:
    for seed in SEEDS:
        planted.value("barriers without the exited", seed=seed)


def test_launch_after_a_fault_is_right_and_the_fault_is_kept(planted: Planted) -> None:
    result = planted.run("after a fault", 1001, 64)
    assert (result.value, result.error) == (501501, SUCCESS)
    assert "throws: planted" in result.fault


# grid, block, bytes of shared memory, blocks of a cluster, bytes asked for first
LAUNCHES = {
    "plain": ((1, 1, 1, 1, 1, 1, 0, 1, 0), SUCCESS),
    "deepest grid": ((1, 1, 65535, 1, 1, 1, 0, 1, 0), SUCCESS),
    "largest block": ((1, 1, 1, 512, 1, 2, 49152, 1, 0), SUCCESS),
    "empty grid": ((0, 1, 1, 32, 1, 1, 0, 1, 0), INVALID_CONFIGURATION),
    "empty block": ((1, 1, 1, 32, 0, 1, 0, 1, 0), INVALID_CONFIGURATION),
    "too many threads": ((1, 1, 1, 512, 3, 1, 0, 1, 0), INVALID_CONFIGURATION),
    "grid too high": ((1, 65536, 1, 1, 1, 1, 0, 1, 0), INVALID_CONFIGURATION),
    "grid too deep": ((1, 1, 65536, 1, 1, 1, 0, 1, 0), INVALID_CONFIGURATION),
    "over 48 KB": ((1, 1, 1, 32, 1, 1, 49153, 1, 0), INVALID_VALUE),
    "over 48 KB, asked for": ((1, 1, 1, 32, 1, 1, 49153, 1, 49153), SUCCESS),
    "over what was asked for": ((1, 1, 1, 32, 1, 1, 49154, 1, 49153), INVALID_VALUE),
    "more than the device has": ((1, 1, 1, 32, 1, 1, 232449, 1, 232449), INVALID_VALUE),
    "cluster": ((16, 1, 1, 32, 1, 1, 0, 8, 0), SUCCESS),
    "cluster that does not divide the grid": ((15, 1, 1, 32, 1, 1, 0, 2, 0), INVALID_CLUSTER_SIZE),
    "cluster too large": ((16, 1, 1, 32, 1, 1, 0, 16, 0), INVALID_CLUSTER_SIZE),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launch_is_refused_where_cuda_refuses_it(planted: Planted, case: str) -> None:
    numbers, error = LAUNCHES[case]
    result = planted.run("launch", *numbers)
    assert (result.value, result.error, result.fault) == (error, error, "")


def test_a_device_may_be_pretended_to_be_small(planted: Planted) -> None:
    def error(case: str, shared_bytes: int, cluster: int) -> int:
        return planted.run(case, 16, 1, 1, 32, 1, 1, shared_bytes, cluster, 0).error

    assert error("launch on a small device", 4096, 1) == SUCCESS
    assert error("launch on a small device", 4097, 1) == INVALID_VALUE
    assert error("launch on a small device", 4096, 4) == SUCCESS
    assert error("launch on a small device", 4096, 8) == OUT_OF_RESOURCES
    assert error("launch without clusters", 0, 1) == SUCCESS
    assert error("launch without clusters", 0, 2) == NOT_SUPPORTED


@pytest.mark.parametrize(
    ("shared_bytes", "cluster", "count"), [(0, 1, 32), (0, 8, 4), (60000, 1, 12), (200000, 4, 1), (200000, 8, 0)]
)
def test_active_clusters_are_those_that_fit_at_once(
    planted: Planted, shared_bytes: int, cluster: int, count: int
) -> None:
    assert planted.value("active clusters", shared_bytes, cluster) == count


def test_launches_are_counted_and_refused_launches_are_not(planted: Planted) -> None:
    assert planted.value("count launches") == 211  # two launches, and the attributes of the device: 132 and clusters
