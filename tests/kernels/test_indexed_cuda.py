"""The CUDA kernels of pointwise losses over class indices, on the CPU: the build of test_softmax_cuda.py."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiler import CSRC
from executor import DTYPES, GRAD, SANITIZED, SUM, WIDTH, Guarded, assert_close, filled, pretend, rebuilt, run_indexed
from executor import LOSSES as LOSSES_OF_EACH
from losses import NATIVE
from marks import needs_compiler, needs_extension
from plant import planted
from torch import Tensor

pytestmark = [needs_extension, needs_compiler]
OP = "sigmoid_focal"
PARAMS = [(0.25, 2.0), (-1.0, 0.5)][: 1 if SANITIZED else 2]  # one for each functor
UNROLL = 4


def shapes(dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """(outer, classes, inner): rows shorter and longer than a vector, a block and a grid."""
    width = WIDTH[dtype]
    threads = 2 * 3 * 256  # of a grid on two multiprocessors
    for classes in (1, 2, 3, width - 1 or 5, width, width + 1, 4 * width + 1):
        yield 1, classes, 1
        yield 37, classes, 1
    yield 3, 256 * width + 1, 1
    yield 2, UNROLL * threads * width + 3, 1  # a step of more columns than rows
    yield UNROLL * threads + 11, width, 1
    yield 8 * 256, width, 1  # up to here a sum is one block
    yield 8 * 256 + 1, width, 1
    for classes in (1, 7, 8, 9, 21):
        yield 1, classes, 2
        yield 3, classes, 33
    yield 2, 17, threads + 5  # a step of several groups
    yield 40, 9, 50


def data(shape: tuple[int, int, int], dtype: torch.dtype, offset: int) -> tuple[Guarded, Tensor]:
    """Logits and an index of every kind but bad ones; those of ignored rows are NaN."""
    outer, classes, inner = shape
    generator = torch.Generator().manual_seed(classes)
    index = torch.randint(-1, classes + 1, (outer, inner), generator=generator)
    index.view(-1)[1::5] = -100
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x.masked_fill_((index == -100).unsqueeze(1), float("nan"))
    return filled(x, dtype, offset), index


def weights(shape: tuple[int, int, int], dtype: torch.dtype, kind: int) -> Tensor | None:
    outer, classes, inner = shape
    sizes = [None, (1, classes, 1), (outer, 1, inner), shape][kind]
    return None if sizes is None else (torch.rand(sizes, dtype=torch.float64) + 0.5).to(dtype)


def exact(
    x: Tensor, index: Tensor, weight: Tensor | None, params: tuple[float, ...], reduction: str, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = x.double().requires_grad_()
    weight = None if weight is None else weight.double()
    value = NATIVE[OP](leaf, index, weight, reduction, *params, ignore_index=-100)
    return value.detach(), torch.autograd.grad(value, leaf, upstream.double())[0]


def check(library, dtype: torch.dtype, shape, params, kind: int = 0, of_input: int = 0, of_others: int = 0) -> None:
    x, index = data(shape, dtype, of_input)
    weight = weights(shape, dtype, kind)
    what = f"{shape} at {of_input}, {of_others}, weights {kind}"
    call = {"name": OP, "params": params, "input": x.tensor, "index": index, "weight": weight}
    output, total = Guarded.like(shape, dtype, of_others), torch.full((), 77.0, dtype=dtype)
    each = filled(torch.rand(shape, dtype=torch.float64) + 0.5, dtype, of_others).tensor
    one = torch.tensor(1.5, dtype=dtype)

    assert run_indexed(library, result=LOSSES_OF_EACH, output=output.tensor, **call)[0] == -1
    losses, grad = exact(x.tensor, index, weight, params, "none", each)
    assert_close(output.tensor, losses, dtype, f"losses of {what}")
    run_indexed(library, result=GRAD, output=output.tensor, upstream=each, **call)
    assert_close(output.tensor, grad, dtype, f"gradients of {what}")
    for mean in (False, True):
        assert run_indexed(library, result=SUM, total=total, mean=mean, **call)[0] == -1
        run_indexed(library, result=GRAD, output=output.tensor, upstream=one, mean=mean, **call)
        value, grad = exact(x.tensor, index, weight, params, "mean" if mean else "sum", one)
        assert_close(total, value, dtype, f"total of {what}")
        assert_close(output.tensor, grad, dtype, f"gradient of the total of {what}")
    assert output.intact() and x.intact(), what


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_every_boundary(kernels, params, dtype):
    for seed, shape in enumerate(shapes(dtype)):
        pretend(kernels, seed)
        check(kernels, dtype, shape, params, kind=seed % 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment(kernels, dtype):
    for seed, offset in enumerate(range(1, WIDTH[dtype])):
        pretend(kernels, seed)
        for shape in ((11, 5, 1), (2, 3 * WIDTH[dtype], 1), (2, 5, 6)):
            check(kernels, dtype, shape, PARAMS[0], kind=seed % 4, of_input=offset, of_others=offset)
            check(kernels, dtype, shape, PARAMS[0], of_input=offset)  # no common alignment: scalars throughout
            check(kernels, dtype, shape, PARAMS[0], of_others=offset)


def test_all_rows_ignored(kernels):
    pretend(kernels)
    for shape in ((9, 7, 1), (2, 7, 5)):
        x, index = torch.full(shape, float("nan")), torch.full((shape[0], shape[2]), -100)
        total, output = torch.empty(()), torch.full(shape, 77.0)
        for mean, expected in ((False, 0.0), (True, float("nan"))):
            run_indexed(kernels, OP, PARAMS[0], SUM, x, index, total=total, mean=mean)
            run_indexed(kernels, OP, PARAMS[0], GRAD, x, index, output=output, upstream=torch.tensor(1.0), mean=mean)
            torch.testing.assert_close(total, torch.tensor(expected), equal_nan=True)
            assert (output == 0).all()


@pytest.mark.parametrize("shape", [(9, 7, 1), (40, 3, 1), (2, 5000, 1), (3, 21, 40)])
def test_a_bad_target_is_reported_and_harms_no_other_row(kernels, shape):
    pretend(kernels)
    guarded, index = data(shape, torch.float32, 0)
    x, rows = guarded.tensor, index.numel()
    for bad in (shape[1] + 1, 1 << 62):
        index.view(-1)[rows // 2] = bad
        losses, grad, total = torch.empty(shape), torch.empty(shape), torch.empty(())
        call = {"name": OP, "params": PARAMS[0], "input": x, "index": index}
        assert run_indexed(kernels, result=LOSSES_OF_EACH, output=losses, **call) == (rows // 2, bad)
        assert run_indexed(kernels, result=SUM, total=total, **call) == (rows // 2, bad)
        run_indexed(kernels, result=GRAD, output=grad, upstream=torch.ones(()), **call)

        good = index.clone()
        good.view(-1)[rows // 2] = -100
        expected, expected_grad = exact(x, good, None, PARAMS[0], "none", torch.ones(shape))
        of_row = (index == bad).unsqueeze(1).expand(shape)
        assert losses[of_row].isnan().all() and total.isnan()
        torch.testing.assert_close(losses[~of_row], expected[~of_row].float())
        torch.testing.assert_close(grad, expected_grad.float())


def test_the_same_bits_whatever_the_order_of_blocks_and_threads(kernels):
    for shape in ((5000, 9, 1), (3, 9, 5000)):
        x, index = data(shape, torch.float32, 0)
        totals = []
        for seed in range(8):
            pretend(kernels, seed)
            totals.append(torch.empty(()))
            run_indexed(kernels, OP, PARAMS[0], SUM, x.tensor, index, total=totals[-1], mean=True)
        assert all(torch.equal(total, totals[0]) for total in totals)


# name: (what stands there, what is put in its place, a shape that must show it)
PLANTED = {
    "a row's end overlooked": ("if (left < width) {", "if (false) {", (37, 5, 1)),
    "a short row's end overlooked": ("++columns[u] == classes && k + 1 < width", "false", (37, 3, 1)),
    "the carry of a step": ("row += carry;", "", (4 * 1536 + 11, 7, 1)),
    "the carry of a group": ("i -= inner;\n      ++group;", "i -= inner;", (2, 17, 1541)),
    "a row counted twice": ("if (first_class == 0) element.note", "element.note", (3, 9, 33)),
    "ignored rows counted": ("if (kSums && named != kIgnored)", "if (kSums)", (37, 5, 1)),
    "a head left out": ("const int64_t i = run.scalar(scalar), of_row", "const int64_t i = scalar, of_row", (37, 5, 1)),
}


@pytest.mark.deep("bugs planted in the CUDA kernels, which must fail; the kernels as they are were compared")
@pytest.mark.skipif(SANITIZED, reason="the other run does it")
def test_the_kernels_that_bugs_are_planted_in_are_right(kernels, tmp_path):
    library = rebuilt(kernels, Path(shutil.copytree(CSRC, tmp_path / "csrc")), "pointwise_indexed.cu")
    for _, _, shape in PLANTED.values():
        check(library, torch.float32, shape, PARAMS[0])


@pytest.mark.deep("bugs planted in the CUDA kernels, which must fail; the kernels as they are were compared")
@pytest.mark.skipif(SANITIZED, reason="the other run does it")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(kernels, tmp_path, bug):
    old, new, shape = PLANTED[bug]
    source = planted(tmp_path, "cuda/pointwise_indexed.cu", old, new)
    library = rebuilt(kernels, source, "pointwise_indexed.cu")
    with pytest.raises(AssertionError):
        check(library, torch.float32, shape, PARAMS[0])
