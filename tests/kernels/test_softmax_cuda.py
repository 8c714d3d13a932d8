"""The CUDA kernels on the CPU: every path, dtype and boundary against native PyTorch in float64. Here the softmax
family.

A run pretends a device so small that a few thousand logits reach every threshold: 2 multiprocessors, and 16,000 bytes
of shared memory a block where residency is at stake.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from compiler import COMPILER, CSRC
from executor import (
    BACKWARD,
    DIVISOR,
    DTYPES,
    FORWARD,
    IN_FORWARD,
    SANITIZED,
    SUM,
    WIDTH,
    Guarded,
    assert_close,
    filled,
    pretend,
    rebuilt,
    run_pointwise,
    run_scale,
    run_softmax,
)
from losses import CROSS_ENTROPY, NATIVE, SOFTMAX, Loss
from marks import needs_compiler, needs_extension
from plant import planted
from torch import Tensor

pytestmark = [needs_extension, needs_compiler]  # the extension for the order of the losses


def row_shapes(dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(rows, classes) around every threshold of plan.h."""
    width = WIDTH[dtype]
    vectors, warp = 16 * width, 512 * width  # the shortest row read by vectors, the longest one of a warp
    part = 256 * (2 if dtype == torch.float64 else 4) * width  # the least that is worth a block of its own
    for classes in (1, 2, 3, vectors - 1, vectors, vectors + 1, 31, 32, 33):
        yield 1, classes
        yield 40, classes
    yield from ((600, 3), (1200, 10), (300, 64), (200, 65), (70, 130), (40, 256), (40, 257))  # tiles of several rows
    for classes in (warp - 1, warp, warp + width, warp + width + 1):
        yield 9, classes
    yield 1, 2 * part
    yield 2, 3 * part + 5
    yield 40, 2 * part - 1


def column_shapes(dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """(batch, classes, inner)."""
    width = WIDTH[dtype]
    for inner in (2, width - 1 or 3, width, 2 * width, 33):
        for classes in (1, 3, 21):
            yield 3, classes, inner
    yield 2, 70, 8 * width  # classes shared out between threads
    yield 1, 5, 1500
    yield 2, 4, 256 * width * 3


def check_softmax(
    kernels, loss: Loss, dtype: torch.dtype, x: Tensor, weighted: bool, guarded: Guarded, wide: bool = False,
    second: bool = False, sampled: bool = False,
) -> None:  # fmt: skip
    classes, rows = x.shape[1], x.numel() // x.shape[1]
    _, target = loss.data(tuple(x.shape), dtype, seed=classes)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    of_result = arithmetic if wide else dtype
    if loss.soft and wide:
        target = target.to(arithmetic)
    if loss.soft and not x.is_contiguous():
        target = torch.empty_like(x, dtype=target.dtype).copy_(target)
    weight = torch.rand(classes, dtype=torch.float64).add(0.5).to(dtype) if weighted else None
    w = None if weight is None else weight.to(arithmetic)
    what = f"{tuple(x.shape)} of strides {x.stride()}"
    shape = loss.losses_shape(tuple(x.shape))
    sample_weight = None
    if sampled:
        sample_weight = torch.rand(shape, dtype=torch.float64).add(0.5).to(arithmetic)
        sample_weight.view(-1)[3::7] = 0
        if not second:  # which is of all rows
            x.movedim(1, -1)[sample_weight == 0] = float("nan")
    original = x.clone()

    def exact(reduction: str, upstream: Tensor, upstream_second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = original.double().requires_grad_()
        native = NATIVE[loss.op]
        of_target = target.double() if loss.soft else target
        of_weight = None if weight is None else weight.double()
        s = None if sample_weight is None else sample_weight.double()
        results = native(leaf, of_target, of_weight, reduction, -100, *loss.params, second=second, sample_weight=s)
        value, of_second = results if second else (results, None)
        upstreams = [upstream.double()] + ([upstream_second.double()] if second else [])
        (grad,) = torch.autograd.grad([value] + ([of_second] if second else []), leaf, upstreams)
        return value.detach(), of_second.detach() if second else upstream_second, grad

    statistics = Guarded.like((3 * rows + 1,), arithmetic)
    divisor = statistics.tensor[3 * rows :]
    losses, grad = Guarded.like(shape, of_result), Guarded.like(tuple(x.shape), dtype, x.storage_offset() % 8)
    seconds = Guarded.like(shape, of_result)
    to = grad.tensor if x.is_contiguous() else torch.empty_like(x)
    to.zero_()  # where a loss writes nothing but the target's gradient
    random = lambda: (torch.rand(shape, dtype=torch.float64) + 0.5).to(of_result)  # noqa: E731
    each, each_second, one = random(), random(), torch.tensor(1.5, dtype=of_result)
    total = torch.full((), 77.0, dtype=of_result)
    everything = {
        "name": loss.op,
        "params": loss.params,
        "logits": x,
        "target": target,
        "weight": w,
        "sample_weight": sample_weight,
        "divisor": divisor,
        "statistics": statistics.tensor,
        "wide": wide,
    }
    of_second = {"second": seconds.tensor} if second else {}
    upstream_second = {"upstream_second": each_second} if second else {}

    run_softmax(kernels, FORWARD, **everything, **of_second, losses=losses.tensor)
    expected, expected_second, expected_grad = exact("none", each, each_second)
    assert_close(losses.tensor, expected, of_result, f"losses of {what}")
    if second:
        assert_close(seconds.tensor, expected_second, of_result, f"second results of {what}")
    assert divisor == 1
    run_softmax(kernels, BACKWARD, **everything, grad=to, upstream=each, **upstream_second)
    assert_close(to, expected_grad, dtype, f"gradients of {what}")

    statistics.tensor.fill_(77)
    to.zero_()
    run_softmax(kernels, FORWARD, **everything, **of_second, total=total, mean=True)
    expected, _, expected_grad = exact("mean", one, each_second)
    assert_close(total, expected, of_result, f"mean of {what}")
    run_softmax(kernels, BACKWARD, **everything, mean=True, grad=to, upstream=one, **upstream_second)
    nothing = not loss.soft and bool((target == -100).all())
    if not (nothing and second):
        expected_grad = expected_grad.nan_to_num() if nothing else expected_grad
        assert_close(to, expected_grad, dtype, f"gradient of the mean of {what}")
    if loss.op == "nll":
        assert all(g.intact() for g in (guarded, statistics, losses, grad)), what
        return
    in_place = {"grad": x, "in_place": True}
    run_softmax(kernels, BACKWARD, **everything, mean=True, upstream=one, **upstream_second, **in_place)
    assert torch.equal(x, to) or to.isnan().any(), f"gradient in place of {what}"
    x.copy_(original)
    if dtype in IN_FORWARD and not second:
        for destination in ({"grad": to}, in_place):
            statistics.tensor.fill_(77)
            run_softmax(kernels, DIVISOR, **everything, mean=True)
            run_softmax(kernels, FORWARD, **everything, total=total, mean=True, **destination)
            assert_close(total, expected, of_result, f"mean with gradient of {what}")
            assert_close(destination["grad"], expected_grad / 1.5, dtype, f"gradient in forward of {what}")
        x.copy_(original)
    assert all(g.intact() for g in (guarded, statistics, losses, seconds, grad)), what


# One of each kernel that the lists expand to.
OF_KERNELS = [loss for loss in SOFTMAX if loss.op != "focal" or loss.params[1] == 2]
if SANITIZED:  # see keep_one_of_each_driver
    LEFT_OUT = ("focal gamma=2.0 alpha=0.25", "cross_entropy 0.1, 0.0, 0.0", "soft_cross_entropy 0.0, 0.0, 0.0")
    OF_KERNELS = [loss for loss in OF_KERNELS if loss.name not in LEFT_OUT]


def share_of(shapes: Iterator[tuple[int, ...]], loss: Loss) -> Iterator[tuple[int, tuple[int, ...]]]:
    """All shapes for the first loss; of the others each takes a third, which together is all of them. Under sanitizers
    each shape is for one loss."""
    share, losses_of_a_shape = OF_KERNELS.index(loss), len(OF_KERNELS) if SANITIZED else 3
    for seed, shape in enumerate(shapes):
        if (share == 0 and not SANITIZED) or seed % losses_of_a_shape == share % losses_of_a_shape:
            yield seed, shape


def has_second(loss: Loss) -> bool:
    return "cross_entropy" in loss.op or (loss.op == "log_probs" and loss.params[1] > 0)


def check_variants(kernels, loss: Loss, dtype: torch.dtype, x: Guarded, seed: int) -> None:
    """With weights of classes and of rows, wide results and a second result now and then."""
    check_softmax(
        kernels, loss, dtype, x.tensor, weighted=seed % 5 < 2 and loss.op != "log_probs", guarded=x,
        wide=seed % 2 == 0, second=has_second(loss) and seed % 4 < 2, sampled=seed % 3 == 0,
    )  # fmt: skip


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", OF_KERNELS, ids=lambda loss: loss.name)
def test_rows_at_every_boundary(kernels, loss, dtype):
    for seed, shape in share_of(row_shapes(dtype), loss):
        pretend(kernels, seed)
        x = filled(loss.data(shape, dtype)[0], dtype, offset=seed % 3)
        check_variants(kernels, loss, dtype, x, seed)


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("dtype", IN_FORWARD, ids=str)
def test_rows_that_stay_in_a_block_in_a_cluster_or_nowhere(kernels, dtype, clusters):
    size = torch.empty((), dtype=dtype).element_size()
    # Statistics of 8 warps and the block and a gradient, twice, two sums a warp, and 32 rows that are not finished.
    reserved = 2336 if dtype == torch.float64 else 1504
    shared_bytes = 16_000
    block = (shared_bytes - reserved) // size
    for seed, classes in enumerate((block - 9, block + 9, 2 * block, 3 * block + 1, 8 * block - 99, 8 * block + 99)):
        pretend(kernels, seed, shared_bytes=shared_bytes, clusters=clusters)
        x = filled(CROSS_ENTROPY.data((3, classes), dtype)[0], dtype, offset=seed % 2)
        check_softmax(kernels, CROSS_ENTROPY, dtype, x.tensor, weighted=False, guarded=x)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", OF_KERNELS, ids=lambda loss: loss.name)
def test_columns_at_every_boundary(kernels, loss, dtype):
    for seed, shape in share_of(column_shapes(dtype), loss):
        pretend(kernels, seed)
        x = filled(loss.data(shape, dtype)[0], dtype, offset=seed % 2 * 8)
        check_variants(kernels, loss, dtype, x, seed)


def test_layouts_that_are_neither(kernels):
    for dtype in DTYPES:
        storage = filled(torch.randn(6, 40, 10, dtype=torch.float64), dtype)
        for view in (
            storage.tensor[:, ::2, 0],  # classes 20 apart
            storage.tensor[:, :, 1:9],  # a batch that is no run
            storage.tensor.transpose(1, 2)[:, :, :7],  # classes side by side, within an inner dimension
            storage.tensor[:, 3:8].transpose(1, 2),
        ):
            check_softmax(kernels, CROSS_ENTROPY, dtype, view, weighted=False, guarded=storage)


@pytest.mark.parametrize("shape", [(9, 7), (9, 3000), (1, 20000), (2, 7, 40)])
def test_a_bad_target_is_reported_reads_nothing_and_harms_no_other_row(kernels, shape):
    pretend(kernels)
    x, target = CROSS_ENTROPY.data(shape, torch.float32, seed=3)
    rows = target.numel()
    for bad in (shape[1], -1, 1 << 62):
        flat = target.clone().view(-1)
        flat[rows // 2] = bad
        losses, statistics = torch.empty(target.shape), torch.empty(3 * rows + 1)
        grad, upstream = torch.empty_like(x), torch.ones(target.shape)
        shared = {"name": "cross_entropy", "params": (), "logits": x, "target": flat, "divisor": statistics[3 * rows :]}
        met = run_softmax(kernels, FORWARD, **shared, losses=losses, statistics=statistics)
        assert met == (rows // 2, bad)
        run_softmax(kernels, BACKWARD, **shared, statistics=statistics, grad=grad, upstream=upstream)
        total, of_weight_0 = torch.empty(()), torch.zeros(rows)
        met = run_softmax(kernels, FORWARD, **shared, total=total, statistics=statistics, sample_weight=of_weight_0)
        assert met == (rows // 2, bad)
        run_softmax(kernels, FORWARD, **shared, total=total, statistics=statistics)
        assert total.isnan() and losses.view(-1)[rows // 2].isnan()

        good = flat.clone()
        good[rows // 2] = -100
        leaf = x.clone().requires_grad_()
        expected = NATIVE["cross_entropy"](leaf, good.view(target.shape), None, "none", -100)
        expected.sum().backward()
        others = torch.arange(rows) != rows // 2
        torch.testing.assert_close(losses.view(-1)[others], expected.detach().view(-1)[others])
        torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_logits_are_those_of_the_cpu(kernels, dtype):
    pretend(kernels)
    everything = slice(None)  # with -inf, a row that is masked whole
    shapes = ((8, 1), (8, 6), (8, 5000), (1, 6, 8))
    for shape, special, column in product(shapes, (float("nan"), float("inf"), -float("inf")), (0, -1, everything)):
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        target = torch.zeros(8, dtype=torch.long)
        x.movedim(1, -1).view(8, -1)[1, column] = special
        losses, statistics, grad = torch.empty(8, dtype=dtype), torch.empty(25), torch.empty_like(x)
        statistics = statistics.to(torch.float64 if dtype == torch.float64 else torch.float32)
        upstream = torch.ones(8, dtype=dtype)
        shared = {"name": "cross_entropy", "params": (), "logits": x, "target": target, "divisor": statistics[24:]}
        run_softmax(kernels, FORWARD, **shared, losses=losses, statistics=statistics)
        run_softmax(kernels, BACKWARD, **shared, statistics=statistics, grad=grad, upstream=upstream)
        leaf = x.clone().requires_grad_()
        expected = CROSS_ENTROPY.fused(leaf, target.view(shape[:1] + shape[2:]), "none").view(8)
        expected.sum().backward()
        what = f"{special} in {column} of {shape}: "
        torch.testing.assert_close(losses, expected.detach(), equal_nan=True, msg=lambda text, w=what: w + text)
        torch.testing.assert_close(grad, leaf.grad, equal_nan=True, msg=lambda text, w=what: w + text)


def test_the_same_bits_whatever_the_order_of_blocks_and_threads(kernels):
    for shape in ((50, 70), (3, 20000), (2, 5, 300)):
        x, target = CROSS_ENTROPY.data(shape, torch.float32)
        results = []
        for seed in range(8):
            pretend(kernels, seed)
            total, statistics = torch.empty(()), torch.zeros(3 * target.numel() + 1)
            run_softmax(
                kernels, FORWARD, "cross_entropy", (), x, target,
                total=total, mean=True, statistics=statistics, divisor=statistics[-1:],
            )  # fmt: skip
            results.append(torch.cat([total.view(1), statistics]))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_multiplies_and_leaves_a_factor_of_one_alone(kernels, dtype):
    for count in (1, 7, 8, 9, 5000):
        for offset in (0, 1):
            data = filled(torch.randn(count), dtype, offset)
            expected = (data.tensor.double() * 1.5).to(dtype)
            run_scale(kernels, data.tensor, torch.tensor(1.0, dtype=dtype))
            assert torch.equal(data.storage, data.before)
            for wide in (dtype, torch.float64 if dtype == torch.float64 else torch.float32):
                before = data.tensor.clone()
                run_scale(kernels, data.tensor, torch.tensor(1.5, dtype=wide))
                assert torch.equal(data.tensor, expected) and data.intact()
                data.tensor.copy_(before)


def test_small_shapes_need_one_launch(kernels):
    pretend(kernels)
    x, target = CROSS_ENTROPY.data((8, 10), torch.float32)
    total, statistics = torch.empty(()), torch.empty(25)
    before = kernels.launches()
    run_softmax(
        kernels, FORWARD, "cross_entropy", (), x, target,
        total=total, mean=True, statistics=statistics, divisor=statistics[-1:],
    )  # fmt: skip
    run_pointwise(kernels, "huber", (1.0,), SUM, x, x, total=total)
    assert kernels.launches() - before == 2


# ---- the same under sanitizers, and with bugs planted


@pytest.mark.deep("runs under sanitizers; the guard elements of every run see writes beyond a tensor", minutes=3)
@pytest.mark.skipif(SANITIZED, reason="this is that run")
def test_no_sanitizer_finds_anything():
    runtime = subprocess.run([*COMPILER.split(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not os.path.isabs(runtime.stdout.strip()):
        pytest.skip("the compiler has no AddressSanitizer; the guard elements of the other tests see what it would")
    files = sorted(map(str, Path(__file__).parent.glob("test_*_cuda.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--deep", "-p", "no:cacheprovider", *files],
        env={
            **os.environ,
            "FUSEDLOSS_SANITIZED_KERNELS": "1",
            "LD_PRELOAD": runtime.stdout.strip(),
            # Python and torch leave memory at exit, and their libraries are of another build than these kernels.
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def rows_of(*shape: int, offset: int = 0, **device: int):
    def check(library, seed: int) -> None:
        pretend(library, seed, **device)
        x = filled(CROSS_ENTROPY.data(shape, torch.float32)[0], torch.float32, offset)
        check_softmax(library, CROSS_ENTROPY, torch.float32, x.tensor, weighted=False, guarded=x)

    return check


# name: (file, what stands there, what is put in its place, what must fail for some order of the threads)
PLANTED = {
    "no barrier between a row's warps": (
        "softmax_rows.cu",
        "if (lane == 0) shared.warps[turn][warp] = mine;\n    __syncthreads();",
        "if (lane == 0) shared.warps[turn][warp] = mine;",
        rows_of(5, 3000),
    ),
    "one buffer for all rows": ("softmax_rows.cu", "turn ^= 1", "turn = 0", rows_of(40, 3000)),
    "no barrier in a cluster": (
        "softmax_rows.cu",
        "shared.block[turn] = mine;\n    cluster_barrier();",
        "shared.block[turn] = mine;",
        rows_of(3, 5000, shared_bytes=6000),
    ),
    "a block leaves its cluster early": (
        "softmax_rows.cu",
        "if (plan.cluster > 1) cluster_barrier();",
        "",
        rows_of(1, 2100, shared_bytes=3000),
    ),
    "a gradient used before it is set up": (
        "softmax_rows.cu",
        "if (plan.lanes > kWarp) {\n    __syncthreads();",
        "if (plan.lanes > kWarp) {",
        rows_of(9, 3000),
    ),
    "rows of a tile used before they have come": (
        "softmax_tiles.cu",
        "tile.read(logits);\n    __syncthreads();",
        "tile.read(logits);",
        rows_of(40, 10),
    ),
    "a tile overwritten before it has gone": (
        "softmax_tiles.cu",
        "first * plan.classes);\n    }\n    __syncthreads();",
        "first * plan.classes);\n    }",
        rows_of(5000, 10, offset=1),  # a gradient of another alignment leaves by other threads than brought the logits
    ),
    "no barrier between shares of the classes": (
        "softmax_columns.cu",
        "= *this;\n    __syncthreads();",
        "= *this;",
        rows_of(2, 70, 32),
    ),
}


@pytest.mark.deep("bugs planted in the CUDA kernels, which must fail; the kernels as they are were compared")
@pytest.mark.skipif(SANITIZED, reason="the other run does it")
@pytest.mark.parametrize("file", ["softmax_rows.cu", "softmax_tiles.cu", "softmax_columns.cu"])
def test_the_kernels_that_bugs_are_planted_in_are_right(kernels, tmp_path, file):
    library = rebuilt(kernels, Path(shutil.copytree(CSRC, tmp_path / "csrc")), file, softmax="cross_entropy")
    for of_bug, _, _, check in PLANTED.values():
        for seed in range(3 if of_bug == file else 0):
            check(library, seed)


@pytest.mark.deep("bugs planted in the CUDA kernels, which must fail; the kernels as they are were compared")
@pytest.mark.skipif(SANITIZED, reason="the other run does it")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(kernels, tmp_path, bug):
    file, old, new, check = PLANTED[bug]
    library = rebuilt(kernels, planted(tmp_path, f"cuda/{file}", old, new), file, softmax="cross_entropy")
    for seed in range(1000):  # the rarest shows in one of 300 orders
        check(kernels, seed)
        try:
            check(library, seed)
        except AssertionError:
            return
    pytest.fail("1000 orders of the threads, and every result was right")
