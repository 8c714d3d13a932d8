"""The CUDA kernels of losses of whole rows on the CPU: as test_pointwise_cuda.py, whose build they share."""

import itertools
from pathlib import Path

import pytest
import torch
from drawn import random
from executor import (
    DTYPES,
    LABELS,
    SANITIZED,
    TOLERANCES,
    WIDTH,
    Guarded,
    filled,
    pretend,
    rebuilt,
    run_row_sums,
)
from marks import needs_compiler, needs_extension
from plant import planted
from torch import Tensor

from fusedloss._route import ROW_SUMS

pytestmark = [needs_extension, needs_compiler]

# {what: (loss, parameters)}: one of each kernel.
KERNELS: dict[str, tuple[str, tuple[float, ...]]] = {
    "cosine": ("cosine_embedding", (0.1,)),
    "triplet": ("triplet_margin", (1.0, 2.0, 1e-6, 0.0)),
    "triplet, swap": ("triplet_margin", (0.5, 2.0, 1e-6, 1.0)),
    "triplet, norm 1": ("triplet_margin", (1.0, 1.0, 1e-3, 0.0)),
    "triplet, norm 1, swap": ("triplet_margin", (1.0, 1.0, 1e-3, 1.0)),
    "margins": ("multi_margin", (1.0, 1.0)),
    "margins, squared": ("multi_margin", (2.0, 0.7)),
}
if SANITIZED:
    KERNELS = {name: KERNELS[name] for name in ("cosine", "triplet, swap", "margins")}
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPERANDS = {"cosine_embedding": 2, "triplet_margin": 3, "multi_margin": 1}


class Call:
    """Operands in the dtype, and what native float64 makes of them."""

    def __init__(self, kernel: str, dtype: torch.dtype, rows: int, columns: int) -> None:
        self.name, self.params = KERNELS[kernel]
        self.dtype = dtype
        self.operands = [random(rows, columns, seed=seed).to(dtype) for seed in range(OPERANDS[self.name])]
        self.target: Tensor | None = None
        self.weight: Tensor | None = None
        if self.name == "cosine_embedding":
            self.target = torch.tensor([1, -1, 3]).repeat(rows)[:rows].to(dtype)
        if self.name == "multi_margin":
            self.target = (random(rows, seed=5).abs() * 1000).long() % columns
            self.weight = random(columns, seed=6).abs() + 0.5
        self.upstream = random(rows, seed=7).to(dtype)

    def exact(self, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [each.detach().double().requires_grad_() for each in self.operands]
        first, second, third = [*leaves, None, None][:3]
        value = ROW_SUMS[self.name].native(first, second, third, self.target, self.weight, "none", *self.params)
        return value.detach(), list(torch.autograd.grad(value, leaves, upstream.double()))

    def given(self) -> tuple[str, tuple[float, ...], list[Tensor], Tensor | None, Tensor | None]:
        weight = self.weight
        if weight is not None and self.dtype != torch.float64:
            weight = weight.float()
        return self.name, self.params, self.operands, self.target, weight

    def check(self, got: Tensor, exact: Tensor, what: str) -> None:
        """A loss of triplets is a difference of distances, and one of cosines of numbers of about 1."""
        columns = self.operands[0].shape[1]
        of_distance = columns if self.params[1:2] == (1.0,) else columns**0.5
        magnitude = of_distance if self.name == "triplet_margin" and what != "gradient" else 1.0
        arithmetic = torch.float64 if self.dtype == torch.float64 else torch.float32
        rounding = TOLERANCES[arithmetic] * magnitude
        assert torch.equal(got.isnan(), exact.isnan()), f"{what}: NaN at other places"
        error, largest = (got.double() - exact).nan_to_num().abs().max(), exact.nan_to_num().abs().max()
        assert error <= TOLERANCES[got.dtype] * largest + rounding, f"{what}: off by {error:.1e}, largest {largest:.1e}"


# Columns: of a warp and of a block, of vectors and of single numbers; rows that a block and a grid go on to.
SIZES = [(1, 1), (3, 7), (13, 32), (9, 64), (40, 129), (5, 1024), (3, 4099), (2, 8192), (300, 16)]
if SANITIZED:
    SIZES = [(3, 7), (13, 32), (3, 4099), (2, 8192)]


@pytest.mark.parametrize("rows, columns", SIZES)
@each_dtype
@each_kernel
def test_losses_sums_and_gradients(kernels, kernel, dtype, rows, columns):
    call = Call(kernel, dtype, rows, columns)
    losses, grads = call.exact(call.upstream)
    for seed in range(2):
        pretend(kernels, seed)
        each = Guarded.like((rows,), dtype)
        run_row_sums(kernels, *call.given(), losses_=each.tensor)
        call.check(each.tensor, losses, "losses")
        total = Guarded.like((), dtype)
        run_row_sums(kernels, *call.given(), total=total.tensor, divisor=rows)
        call.check(total.tensor, losses.mean(), "mean")
        made = [Guarded.like((rows, columns), dtype) for _ in grads]
        run_row_sums(kernels, *call.given(), grads=[each.tensor for each in made], upstream=call.upstream, scale=0.5)
        for got, expected in zip(made, grads, strict=True):
            call.check(got.tensor, expected / 2, "gradient")
            assert got.intact()


@each_dtype
@each_kernel
def test_gradients_of_some_operands_for_one_upstream_gradient(kernels, kernel, dtype):
    call = Call(kernel, dtype, 6, 48)
    _, grads = call.exact(torch.full((6,), 0.75))
    for wanted in itertools.product((True, False), repeat=len(grads)):
        if not any(wanted):
            continue
        made = [Guarded.like((6, 48), dtype) if want else None for want in wanted]
        tensors = [None if each is None else each.tensor for each in made]
        run_row_sums(kernels, *call.given(), grads=tensors, upstream=torch.tensor(0.75, dtype=dtype))
        for got, expected in zip(made, grads, strict=True):
            if got is not None:
                call.check(got.tensor, expected, "gradient")


@pytest.mark.parametrize("offset", [0, 1])
@each_dtype
@each_kernel
def test_rows_apart_and_misaligned(kernels, kernel, dtype, offset):
    whole = 16 * WIDTH[dtype]
    for columns, stride in ((whole, whole + 1), (whole, whole + WIDTH[dtype]), (whole - 1, whole)):
        call = Call(kernel, dtype, 5, columns)
        losses, grads = call.exact(call.upstream)
        wider = [torch.cat([each, each[:, : stride - columns]], 1).double() for each in call.operands]
        stored = [filled(each, dtype, offset) for each in wider]
        call.operands = [each.tensor[:, :columns] for each in stored]
        each = Guarded.like((5,), dtype)
        run_row_sums(kernels, *call.given(), losses_=each.tensor)
        call.check(each.tensor, losses, "losses")
        made = [Guarded.like((5, columns), dtype, offset) for _ in grads]
        run_row_sums(kernels, *call.given(), grads=[each.tensor for each in made], upstream=call.upstream)
        for got, expected in zip(made, grads, strict=True):
            call.check(got.tensor, expected, "gradient")
            assert got.intact()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype in (torch.bfloat16, torch.float16)], ids=str)
@each_kernel
def test_results_in_float32(kernels, kernel, dtype):
    call = Call(kernel, dtype, 7, 40)
    losses, grads = call.exact(call.upstream)
    each, total = Guarded.like((7,), torch.float32), Guarded.like((), torch.float32)
    run_row_sums(kernels, *call.given(), losses_=each.tensor)
    run_row_sums(kernels, *call.given(), total=total.tensor)
    call.check(each.tensor, losses, "losses")
    call.check(total.tensor, losses.sum(), "sum")
    made = [Guarded.like((7, 40), dtype) for _ in grads]
    tensors = [each.tensor for each in made]
    run_row_sums(kernels, *call.given(), grads=tensors, upstream=call.upstream.float())
    for got, expected in zip(made, grads, strict=True):
        call.check(got.tensor, expected, "gradient")


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels_of_every_dtype(kernels, labels):
    call = Call("cosine", torch.float32, 9, 5)
    assert call.target is not None
    losses, _ = call.exact(call.upstream)
    call.target = call.target.to(labels)
    each = Guarded.like((9,), torch.float32)
    run_row_sums(kernels, *call.given(), losses_=each.tensor)
    call.check(each.tensor, losses, "losses")


@pytest.mark.parametrize("index", [-1, 48, -100, 2**40])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("margins")])
def test_a_class_out_of_range_is_told_and_reads_nothing(kernels, kernel, index):
    call = Call(kernel, torch.float32, 6, 48)
    losses, grads = call.exact(call.upstream)
    assert call.target is not None
    call.target[2] = index
    losses[2] = torch.nan
    grads[0][2] = 0
    each, total = Guarded.like((6,), torch.float32), Guarded.like((), torch.float32)
    assert run_row_sums(kernels, *call.given(), losses_=each.tensor) == (2, index)
    call.check(each.tensor, losses, "losses")
    assert run_row_sums(kernels, *call.given(), total=total.tensor) == (2, index)
    assert total.tensor.isnan()
    made = Guarded.like((6, 48), torch.float32)
    assert run_row_sums(kernels, *call.given(), grads=[made.tensor], upstream=call.upstream) == (-1, 0)
    call.check(made.tensor, grads[0], "gradient")


# {name: (file, what stands there, what is put in its place, the kernel that goes wrong)}
MISTAKES = {
    "a row of the block before": ("__syncthreads();  // the row before has been read", "", "triplet"),
    "warps left out": ("warp < kWarps", "warp < kWarps - 1", "cosine"),
    "the target's column added": ("if (takes_class<Loss> && column + i == target) continue;", "", "margins"),
    "a stride of the columns": ("row * args.row_strides[k]", "row * args.columns", "triplet"),
    "vectors beyond a row": ("width > 1 && args.columns % width == 0", "width > 1", "cosine"),
}


@pytest.mark.deep("planted mistakes, each compiled; the kernels as they are pass the tests above", minutes=1)
@pytest.mark.skipif(SANITIZED, reason="the plain run has it")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught(kernels, mistake, tmp_path):
    old, new, kernel = MISTAKES[mistake]
    source = planted(Path(tmp_path), "cuda/row_sums.cu", old, new)
    broken = rebuilt(kernels, source, "row_sums")
    for run in (
        lambda: test_losses_sums_and_gradients(broken, kernel, torch.float32, 9, 4099),
        lambda: test_losses_sums_and_gradients(broken, kernel, torch.float32, 3, 8192),
        lambda: test_rows_apart_and_misaligned(broken, kernel, torch.float32, 0),
    ):
        try:
            run()
        except AssertionError:
            return
    raise AssertionError(f"expected the tests to fail with {mistake}")
