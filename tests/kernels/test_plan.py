"""Grids and plans for the limits of every architecture, on shapes that no CPU could run: all of it is arithmetic.

Calls with no rows never come so far: the torch layer answers them.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import executor
import pytest
import torch
import whole_kernel
from executor import BACKWARD, FORWARD, SoftmaxCall, parameters
from losses import DTYPES, SOFTMAX, number, traits
from marks import needs_compiler, needs_extension

pytestmark = [needs_extension, needs_compiler]


@dataclass(frozen=True)
class Limits:
    multiprocessors: int
    shared_kilobytes: int  # of a block
    shared_kilobytes_of_multiprocessor: int
    threads_of_multiprocessor: int
    clusters: bool


ARCHITECTURES = {
    "sm_80": Limits(108, 163, 164, 2048, False),  # A100
    "sm_86": Limits(84, 99, 100, 1536, False),  # A40
    "sm_89": Limits(142, 99, 100, 1536, False),  # L40S
    "sm_90": Limits(132, 227, 228, 2048, True),  # H100, H200
    "a slice of sm_90": Limits(16, 227, 228, 2048, True),
    "sm_100": Limits(148, 227, 228, 2048, True),  # B200
    "sm_120": Limits(188, 99, 100, 1536, True),  # RTX PRO 6000
}
THREADS, WARP, VECTOR = 256, 32, 16
MOST_BLOCKS = 2**31 - 1
RESERVED = 1024  # bytes of shared memory that CUDA takes for each block
MOST_BLOCKS_WITH_SUMS, WORKSPACE = 2048, 72 << 10  # kMaxBlocks, kCudaWorkspaceBytes
MOST_CLASSES = 2**31 - 1 - (1 << 16)
MOST_BYTES = 1 << 39  # of logits: no GPU holds as many
ROWS = (1, 3, 100, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**31 + 5, 2**33)
CLASSES = (1, 2, 10, 63, 64, 256, 257, 1000, 4096, 4104, 32000, 50257, 128256, 1 << 20, MOST_CLASSES)
TILE = 256  # the most classes of rows that blocks take by tiles, one after another
PLANS = ("forward", "forward with gradient", "backward", "backward in place")


@pytest.fixture(params=ARCHITECTURES)
def limits(request, kernels) -> Iterator[Limits]:
    of = ARCHITECTURES[request.param]
    executor.pretend(kernels, 0, of.multiprocessors, of.shared_kilobytes << 10, of.clusters)
    kernels.only_plan(of.shared_kilobytes_of_multiprocessor << 10, of.threads_of_multiprocessor)
    yield of
    executor.pretend(kernels)


def shapes(size: int) -> list[tuple[int, int]]:
    return [(rows, classes) for rows in ROWS for classes in CLASSES if rows * classes * size <= MOST_BYTES]


@dataclass(frozen=True)
class Plan:
    """RowsPlan of plan.h."""

    lanes: int
    threads: int
    parts: int
    cluster: int
    blocks: int
    slice: int
    resident: int
    resident_vectors: int
    consecutive: int
    resident_bytes: int


def planned(kernels: ctypes.CDLL, what: str, dtype: torch.dtype, rows: int, classes: int) -> Plan:
    numbers = (ctypes.c_int64 * 10)()
    kind, in_place = min(PLANS.index(what), 2), int(what.endswith("place"))
    kernels.plan_rows(kind, DTYPES.index(dtype), ctypes.c_int64(rows), ctypes.c_int64(classes), in_place, numbers)
    return Plan(*numbers)


@pytest.mark.parametrize("what", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_is_dealt_out_within_the_limits(kernels, limits, dtype, what):
    for rows, classes in shapes(dtype.itemsize):
        plan = planned(kernels, what, dtype, rows, classes)
        message = f"{rows} rows of {classes}: {plan}"
        groups = plan.threads // plan.lanes
        assert plan.lanes & (plan.lanes - 1) == 0 and WARP <= plan.threads <= THREADS, message
        assert plan.threads % plan.lanes == 0 and (plan.lanes <= WARP or groups == 1), message
        assert plan.parts * plan.slice >= classes, message
        assert 0 < plan.blocks <= MOST_BLOCKS and plan.blocks % plan.parts == 0, message
        if what.startswith("backward"):
            assert plan.blocks // plan.parts * groups * plan.consecutive >= rows, message
            assert 1 <= plan.consecutive <= 16, message
        else:
            assert plan.blocks <= max(MOST_BLOCKS_WITH_SUMS, plan.parts), message
            statistics = 16 * (2 if dtype.itemsize == 8 else 1)  # of a part, kept where several blocks share a row
            assert plan.parts == plan.cluster or 16 + rows * plan.parts * statistics <= WORKSPACE, message
        assert plan.cluster in (1, 2, 4, 8) and (plan.cluster == 1 or limits.clusters), message
        assert plan.resident_bytes <= limits.shared_kilobytes << 10, message
        assert not plan.resident or (plan.resident_vectors + 1) * VECTOR > plan.slice * dtype.itemsize, message


@pytest.mark.parametrize("classes", [1024, 4096, 4104, 8192, 32000, 128256])
def test_whole_kernels_are_counted_as_rows_are_dealt_out(kernels, classes):
    of = ARCHITECTURES[whole_kernel.ARCHITECTURE]
    executor.pretend(kernels, 0, of.multiprocessors, of.shared_kilobytes << 10, of.clusters)
    lanes = whole_kernel.lanes_of(classes)
    for what in PLANS:
        assert planned(kernels, what, torch.bfloat16, 1 << 20, classes).lanes == lanes
    plan = planned(kernels, "backward", torch.bfloat16, 1 << 20, classes)
    if lanes == WARP:
        assert plan.consecutive == 16
    else:
        assert plan.slice == 2 * whole_kernel.UNROLL * whole_kernel.VECTOR * lanes
    executor.pretend(kernels)


def call_of(name: str, params: tuple[float, ...], dtype: int, rows: int, classes: int, inner: int) -> SoftmaxCall:
    """Of (rows, classes), or where inner is not 1 of (rows / inner, classes, inner); its memory is not touched."""
    memory = 1 << 20
    layout = (rows, classes, rows, 0, 1, classes) if inner == 1 else (rows, classes, inner, inner * classes, inner, 1)
    call = SoftmaxCall(loss=number(name), dtype=dtype, ignore_index=-100, params=parameters(params))
    for field in ("logits", "probabilities", "grad"):
        setattr(call, f"{field}_layout", (ctypes.c_int64 * 6)(*layout))
    for field in ("logits", "target", "statistics", "divisor", "grad", "total"):
        setattr(call, field, memory)
    return call


@pytest.mark.parametrize("gradient", ["", "with gradient", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_is_within_the_limits(kernels, limits, dtype, gradient):
    one_of_each = {loss.op: loss for loss in SOFTMAX if not loss.soft}
    for rows, classes in shapes(dtype.itemsize):
        for inner in {1, 64} if rows % 64 == 0 else {1}:
            for name, loss in one_of_each.items():
                call = call_of(name, loss.params, DTYPES.index(dtype), rows, classes, inner)
                call.what = BACKWARD if gradient == "backward" else FORWARD
                if not gradient:
                    call.grad = None
                before = kernels.launches()
                error = kernels.run_softmax(ctypes.byref(call))
                launch = (ctypes.c_int64 * 3)()
                kernels.last_launch(launch)
                message = f"{name}, {rows} rows of {classes}, inner {inner}: {list(launch)}"
                assert error == 0 and kernels.launches() > before, message
                blocks, threads, shared = launch
                assert blocks <= MOST_BLOCKS and shared <= limits.shared_kilobytes << 10, message
                by_tiles = classes <= TILE and dtype != torch.float64
                if not gradient or (by_tiles and inner == 1 and traits(name).reads_row):
                    # Blocks that go on to further work run all at once.
                    shared_bytes = limits.shared_kilobytes_of_multiprocessor << 10
                    fitting = min(limits.threads_of_multiprocessor // threads, shared_bytes // (shared + RESERVED))
                    assert blocks <= max(1, fitting) * limits.multiprocessors, message
                if gradient == "backward" and (classes > TILE or min(inner, classes) > 1):
                    # A thread has the rows it is given, 16 at most: a number of blocks beyond 32 bits would be cut off.
                    assert blocks * threads * 16 >= rows, message
