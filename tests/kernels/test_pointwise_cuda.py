"""The CUDA kernels of pointwise losses on the CPU: as test_softmax_cuda.py, whose build they share."""

import ctypes
import mmap
import random
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from compiler import CSRC
from executor import (
    CUSTOM,
    DTYPES,
    GRAD,
    IN_FORWARD,
    SANITIZED,
    SUM,
    SUM_AND_GRAD,
    TARGET_GRAD,
    THIRD_GRAD,
    WIDTH,
    Guarded,
    assert_close,
    filled,
    pretend,
    rebuilt,
    run_pointwise,
)
from executor import LOSSES as LOSSES_OF_EACH
from losses import NATIVE, OF_THREE, POINTWISE, Loss, loss_named
from marks import needs_compiler, needs_extension
from plant import planted
from torch import Tensor

pytestmark = [needs_extension, needs_compiler]
BY_NAME = {loss.op: loss for loss in POINTWISE}
LOGITS = BY_NAME["binary_cross_entropy_with_logits"]
FOCAL = [loss for loss in POINTWISE if loss.op == "sigmoid_focal"]
# One of each kernel that the list expands to: focal losses have a second one, for the gamma of most, and counts one
# without a constant.
OF_COUNTS = [loss for loss in POINTWISE if loss.op.startswith("poisson_nll")]
OF_KERNELS = [loss for loss in BY_NAME.values() if loss.op != "sigmoid_focal" and loss not in OF_COUNTS] + [
    *OF_COUNTS,
    next(loss for loss in FOCAL if loss.params[1] == 2),
    next(loss for loss in FOCAL if loss.params[1] not in (0, 2)),
]
if SANITIZED:  # what sanitizers see are the drivers, the same for all; formulas touch no memory
    OF_KERNELS = [BY_NAME["mse"], LOGITS]
OF_DIFFERENCE = ("mse", "l1", "smooth_l1", "huber", *OF_THREE)
# With a slope of its own.
OF_TARGET = (
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "kl_div_log_target", "poisson_nll",
    "poisson_nll_rate", CUSTOM,
)  # fmt: skip
HALF = (torch.bfloat16, torch.float16)
ONE_BLOCK = 8 * 256  # rounds of a thread: up to here a sum is one block
each_kernel = pytest.mark.parametrize("loss", OF_KERNELS, ids=lambda loss: loss.name)


def custom(x: Tensor, t: Tensor, weight: Tensor | None, reduction: str, factor: float) -> Tensor:
    losses = factor * x * x * t * (1 if weight is None else weight)
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def data(loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    x, t = loss.data(shape, dtype, seed)
    # Near 0 and 1 the slope of a probability is beyond a half type, and of the others nothing would be seen.
    return (x.clamp(1 / 64, 63 / 64) if loss.of_probabilities else x), t


def check(
    library, loss: Loss, x: Tensor, t: Tensor, weight: Tensor | None, wide: bool, what: str,
    third: Tensor | None = None, offset: int = 0, order: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Every result for operands of any kind; `order` is that of the output's dimensions in memory."""
    shape = torch.broadcast_shapes(x.shape, t.shape)
    count = torch.Size(shape).numel()
    of_result = torch.float32 if wide and x.dtype in HALF else x.dtype
    of_three = loss.op in OF_THREE and third is not None
    leaves = [tensor.double().expand(shape).clone() for tensor in (x, t, *[third] * of_three)]
    given = {
        "name": loss.op,
        "params": loss.params,
        "input": x,
        "target": t,
        "weight": weight,
        "third": third,
    }
    formula = custom if loss.op == CUSTOM else NATIVE[loss.op]
    of_weight = None if weight is None else weight.double()
    options = {} if third is None or of_three else {"third": third.double()}
    has_target_grad = loss.op in OF_DIFFERENCE + OF_TARGET
    for leaf in leaves if has_target_grad else leaves[:1]:
        leaf.requires_grad_()

    def exact(reduction: str, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
        by_name = {"third": leaves[2]} if of_three else options
        value = formula(*leaves[:2], of_weight, reduction, *loss.params, **by_name)
        of = leaves if has_target_grad else leaves[:1]
        return value.detach(), list(torch.autograd.grad(value, of, upstream.double()))

    def outputs(dtype: torch.dtype) -> tuple[Guarded, Tensor]:
        places = range(len(shape)) if order is None else order
        guarded = Guarded.like(tuple(shape[place] for place in places), dtype, offset)
        return guarded, guarded.tensor.permute(*(list(places).index(dim) for dim in range(len(shape))))

    def check_grads(expected: list[Tensor], upstream: Tensor, scale: float, which: str) -> None:
        run_pointwise(library, result=GRAD, output=grad, upstream=upstream, scale=scale, **given)
        assert_close(grad, expected[0], x.dtype, f"gradients {which} of {what}")
        if not has_target_grad:
            return
        how = (TARGET_GRAD, scale) if loss.op in OF_TARGET else (GRAD, -scale)
        run_pointwise(library, result=how[0], output=grad_target, upstream=upstream, scale=how[1], **given)
        assert_close(grad_target, expected[1], t.dtype, f"gradients {which} by the target of {what}")
        if of_three:
            run_pointwise(library, result=THIRD_GRAD, output=grad_third, upstream=upstream, scale=scale, **given)
            assert_close(grad_third, expected[2], third.dtype, f"gradients {which} by the third operand of {what}")

    each = filled(torch.rand(shape, dtype=torch.float64) + 0.5, of_result, offset)
    one, total = torch.tensor(1.5, dtype=of_result), torch.full((), 77.0, dtype=of_result)
    (kept, losses), (kept_grad, grad), (kept_target, grad_target) = map(outputs, (of_result, x.dtype, t.dtype))
    kept_third, grad_third = outputs(x.dtype if third is None else third.dtype)

    value, grads = exact("none", each.tensor)
    run_pointwise(library, result=LOSSES_OF_EACH, output=losses, **given)
    assert_close(losses, value, of_result, f"losses of {what}")
    check_grads(grads, each.tensor, 1.0, "of each")
    mean, grads = exact("mean", one)
    run_pointwise(library, result=SUM, total=total, divisor=count, **given)
    assert_close(total, mean, of_result, f"mean of {what}")
    check_grads(grads, one, 1 / count, "of the mean")
    if x.dtype in IN_FORWARD:
        total.fill_(77)
        run_pointwise(
            library, result=SUM_AND_GRAD, output=grad, scale=1 / count, total=total, divisor=count, **given
        )  # fmt: skip
        assert_close(total, mean, of_result, f"mean with gradient of {what}")
        assert_close(grad, grads[0] / 1.5, x.dtype, f"gradient in forward of {what}")
    assert all(guarded.intact() for guarded in (each, kept, kept_grad, kept_target, kept_third)), what


# ---- dense operands of one type


def sizes(dtype: torch.dtype) -> Iterator[tuple[int, int, int, int]]:
    """(elements, offset of the input, of target and weight, of results and upstream gradient), in elements."""
    width = WIDTH[dtype]
    one_block = ONE_BLOCK * width
    for count in (1, width - 1, width, width + 1, 31, 32, 33, 255 * width, 256 * width + 1, one_block, one_block + 1):
        yield count, 0, 0, 0
    for offset in range(1, width):
        yield 5 * width, offset, offset, offset
        yield 9, offset, offset, offset
    for offsets in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        yield 1000, *offsets  # no common alignment: scalars throughout
    yield 3 * one_block + 5, 1, 1, 1


def check_dense(library, loss: Loss, dtype: torch.dtype, seed: int, count: int, *offsets: int) -> None:
    values, targets = data(loss, (count,), dtype, seed=count)
    x, t = filled(values, dtype, offsets[0]), filled(targets, dtype, offsets[1])
    weight = filled(torch.rand(count) + 0.5, dtype, offsets[1]).tensor if seed % 2 == 1 else None
    what = f"{count} elements at {offsets}"
    check(library, loss, x.tensor, t.tensor, weight, seed % 3 == 2, what, offset=offsets[2])
    assert x.intact() and t.intact()


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_kernel
def test_every_boundary(kernels, loss, dtype):
    for seed, size in enumerate(sizes(dtype)):
        pretend(kernels, seed)
        check_dense(kernels, loss, dtype, seed, *size)


def test_operands_whose_vectors_are_not_alike_are_read_four_elements_a_thread(kernels):
    """As many blocks tell which kernel: three of the dense one fit a multiprocessor, four of the strided one."""
    pretend(kernels)
    count, launch = 1 << 14, (ctypes.c_int64 * 3)()
    for offsets, blocks in (((0, 0, 0), 3), ((1, 1, 1), 3), ((1, 0, 0), 4), ((0, 1, 0), 4), ((0, 0, 1), 4)):
        x, t, output = (filled(torch.rand(count), torch.bfloat16, offset) for offset in offsets)
        run_pointwise(kernels, "mse", (), LOSSES_OF_EACH, x.tensor, t.tensor, output=output.tensor)
        kernels.last_launch(launch)
        assert launch[0] == 2 * blocks, offsets
        assert_close(
            output.tensor, (x.tensor.double() - t.tensor.double()) ** 2, torch.bfloat16, f"losses at {offsets}"
        )
        assert output.intact()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in HALF], ids=str)
def test_what_is_no_probability_is_nan_and_harms_no_other(kernels, dtype):
    pretend(kernels)
    inside = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 1e-30, 1 - 2**-24], dtype=dtype)
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.25, 0.75], dtype=dtype)
    outside = torch.tensor([-1e-6, 1.001, float("nan"), float("inf")], dtype=dtype)
    x, t = torch.cat([inside, outside, torch.full((4,), 0.5, dtype=dtype)]), torch.cat([target, target[:4], outside])
    for made, wanted in ((LOSSES_OF_EACH, 0), (GRAD, 1)):
        leaf = inside.double().requires_grad_()
        losses = torch.nn.functional.binary_cross_entropy(leaf, target.double(), reduction="none")
        expected = (losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0])[wanted]
        output = torch.empty_like(x)
        run_pointwise(
            kernels, "binary_cross_entropy", (), made, x, t, output=output, upstream=torch.ones((), dtype=dtype)
        )
        torch.testing.assert_close(output[:7].double(), expected, rtol=1e-5, atol=0)
        assert made == GRAD or output[7:].isnan().all()


# ---- operands of any type and strides

SHAPE = (5, 7, 33)
# On two multiprocessors a round of the grid is of 6144 or 8192 elements; a sum of up to 8192 is one block.
LONG = (3, 3001)


def operand(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
    return filled(torch.rand(shape, dtype=torch.float64) + 0.5, dtype, offset).tensor


def layouts() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, str]]:
    """(name, shape of the input, of the target, of the weight, how the input and the target lie)."""
    yield "dense", SHAPE, SHAPE, None, "dense"
    yield "rows", SHAPE, (33,), (33,), "dense"
    yield "columns", SHAPE, (5, 7, 1), (5, 1, 1), "dense"
    yield "a scalar", SHAPE, (), (), "dense"
    yield "rows of the input", (33,), SHAPE, (7, 1), "dense"
    yield "both of them", (5, 1, 33), (7, 1), None, "dense"
    yield "transposed", SHAPE, SHAPE, SHAPE, "transposed"
    yield "every second", SHAPE, SHAPE, SHAPE, "sliced"
    yield "six dimensions", (2, 3, 2, 5, 3, 2), (2, 1, 2, 1, 3, 1), (3, 1, 5, 1, 2), "dense"
    yield "sizes of one", (1, 5, 1, 9, 1), (5, 1, 9, 1), (1, 5, 1, 1, 1), "sliced"
    yield "one element", (1, 1), (1,), (), "dense"
    yield "full blocks", (4, 256), (256,), None, "dense"
    yield "a short block", (2, 128), (128,), (2, 1), "dense"
    yield "several rounds", LONG, (3001,), (3, 1), "dense"


def laid(tensor: Tensor, how: str, offset: int = 0) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if how == "dense" or tensor.dim() < 2:
        return filled(tensor, tensor.dtype, offset).tensor
    if how == "transposed":
        return filled(tensor.mT.contiguous(), tensor.dtype, offset).tensor.mT
    twice = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77)
    twice[..., 1::2] = tensor
    return filled(twice, tensor.dtype, offset).tensor[..., 1::2]


F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Of input and target, and whether results are of float32: what autocast mixes, and what torch promotes.
MIXED = [
    (F32, F32, False), (F64, F64, False), (BF16, BF16, False), (FP16, FP16, False), (BF16, BF16, True),
    (FP16, FP16, True), (BF16, F32, True), (FP16, F32, True), (F32, BF16, False), (F32, FP16, False),
    (F64, F32, False), (F32, F64, False), (FP16, F64, False),
]  # fmt: skip
MIXED = [dtypes for dtypes in MIXED if dtypes[0] in DTYPES and dtypes[1] in DTYPES]


@pytest.mark.thinned(1)
@pytest.mark.parametrize(("of_input", "of_target", "wide"), MIXED, ids=lambda given: str(given).removeprefix("torch."))
@each_kernel
def test_operands_of_every_type_and_layout(kernels, loss, of_input, of_target, wide):
    types = [of_input, *DTYPES]  # of weights, another one for each layout from loss to loss
    for seed, (name, of_x, of_t, of_w, how) in enumerate(layouts()):
        pretend(kernels, seed)
        torch.manual_seed(seed)
        x = laid(data(loss, of_x, of_input, seed)[0], "dense" if how == "transposed" else how, seed % 3)
        t = laid(data(loss, of_t, of_target, seed)[1], how, seed % 2)
        of_weight = types[(seed + OF_KERNELS.index(loss)) % len(types)]
        weight = None if of_w is None else laid(operand(of_w, of_weight), how)
        order = None if seed % 3 else tuple(reversed(range(max(len(of_x), len(of_t)))))
        check(kernels, loss, x, t, weight, wide, name, offset=seed % 4, order=order)


@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)), ids=str)
def test_a_weight_of_the_positive_term(kernels, dtypes):
    of_input, of_pos_weight = dtypes
    of_target = torch.float32 if of_input in HALF and of_pos_weight == torch.float32 else of_input
    for seed, (shape, of_p) in enumerate((((2, 7, 5, 6), (7, 1, 1)), (SHAPE, (33,)), ((700,), (700,)), (LONG, ()))):
        pretend(kernels, seed)
        x, t = data(LOGITS, shape, of_input, seed)
        weight = None if seed % 2 else operand(shape[-1:], of_input)
        check(
            kernels, LOGITS, x, t.to(of_target), weight, of_target != of_input, f"{shape} with {of_p}",
            third=operand(of_p, of_pos_weight, offset=seed),
        )  # fmt: skip


@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("op", OF_THREE)
def test_a_third_operand(kernels, op, dtypes):
    loss, (of_input, of_third) = BY_NAME[op], dtypes
    wide = of_input in HALF and of_third == torch.float32
    shapes = (SHAPE, SHAPE), (SHAPE, (5, 7, 1)), (SHAPE, (33,)), ((5000,), (5000,)), ((1030,), ()), (LONG, (3, 1))
    for seed, (shape, of_shape) in enumerate(shapes):
        for offset in (0, 1):
            pretend(kernels, seed)
            x, t = (laid(each, "dense", offset) for each in data(loss, shape, of_input, seed))
            third = operand(of_shape, of_third, offset)
            if op == "margin_ranking":
                third = laid((2 * (third > 1) - 1).to(of_third), "dense", offset)
            weight = operand(shape[-1:], of_input) if seed == 2 else None
            check(kernels, loss, x, t, weight, wide, f"{shape} with {of_shape}", third=third, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_negative_variance_is_nan_and_reported_and_harms_no_other(kernels, dtype):
    loss, none, told = BY_NAME["gaussian_nll"], (-1, 0), (0, -(2**63))
    for count, strided in ((5000, False), (5000, True), (7, False)):
        x, t = data(loss, (count,), dtype, seed=1)
        for bad in (None, 0, count - 1, count // 2):
            pretend(kernels)
            var, one = operand((count,), dtype), torch.ones((), dtype=dtype)
            if bad is not None:
                var[bad] = -0.25
            third = laid(var[None], "sliced")[0] if strided else var
            given = {"input": x, "target": t, "third": third}
            losses, grad, total = torch.empty_like(x), torch.empty_like(x), torch.empty((), dtype=dtype)
            expected = none if bad is None else told
            run = lambda **how: run_pointwise(kernels, loss.op, loss.params, **given, **how)  # noqa: B023, E731
            assert run(result=LOSSES_OF_EACH, output=losses) == expected
            assert run(result=SUM, total=total) == expected
            assert run(result=GRAD, output=grad, upstream=one) == none
            places = [] if bad is None else [bad]
            assert losses.isnan().nonzero().flatten().tolist() == grad.isnan().nonzero().flatten().tolist() == places
            assert total.isnan() == (bad is not None)
            if dtype in IN_FORWARD:
                assert run(result=SUM_AND_GRAD, output=grad, total=total) == expected
            assert run(result=THIRD_GRAD, output=grad, upstream=one) == none
            assert grad.isnan().nonzero().flatten().tolist() == places


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_of_each_place_of_a_row(kernels, dtype):
    # Rows of whole vectors and of parts of one, and factors that are not aligned.
    shapes = ((9, 8), 0), ((3, 700, 16), 0), ((9, 12), 0), ((9, 24), 1), ((5, 1024), 0), ((11, 48), 0)
    for seed, (shape, offset) in enumerate(shapes):
        pretend(kernels, seed)
        x, t = data(LOGITS, shape, dtype, seed)
        weight = operand(shape[-1:] if seed % 2 else shape, dtype)
        third = operand(shape[-1:], dtype, offset)
        check(kernels, LOGITS, x, t, weight, False, f"{shape} at {offset}", third=third)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_of_no_list(kernels, dtype):
    loss = Loss(CUSTOM, "pointwise", custom, custom, CUSTOM, (1.7,))
    for seed, target in enumerate((dtype, torch.float32)):
        pretend(kernels, seed)
        x, t = loss.data(SHAPE, dtype, seed)
        check(kernels, loss, x, t.to(target), None, target != dtype, "dense")
        check(kernels, loss, x, t[0, 0].to(target), operand((7, 1), dtype), target != dtype, "a row")


def test_offsets_beyond_32_bits(kernels):
    pretend(kernels)
    loss, shape, step = BY_NAME["mse"], (3, 40, 9), 2**30 + 64
    try:  # pages that nobody writes need no memory
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, 2 * (2 * step + 1000), flags=flags)
    except (OSError, AttributeError):
        pytest.skip("no 4 GB of addresses")
    far = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, (step, 1, 40))
    x, t = loss.data(shape, torch.bfloat16)
    far.copy_(t)
    check(kernels, loss, x, far, operand((40, 1), torch.float32), False, "a target beyond 32 bits")


def test_quotients(kernels):
    kernels.quotient.restype = ctypes.c_int64
    numbers = random.Random(0)
    for bits in (31, 62):
        some = [numbers.getrandbits(numbers.randrange(1, bits + 1)) + 1 for _ in range(300)]
        for size in [*range(1, 12), *(1 << shift for shift in range(4, bits)), *some, (1 << bits) - 1]:
            if size >= 1 << bits:
                continue
            most = (1 << bits) - 1
            multiple = most // size * size
            random_one = numbers.randrange(1 << bits)
            for number in (0, size - 1, size, min(2 * size - 1, most), multiple, multiple - 1, most, random_one):
                got = kernels.quotient(ctypes.c_int64(number), ctypes.c_int64(size), ctypes.c_int64(most))
                assert got == number // size, f"{number} / {size} is not {got}"


def test_what_no_kernel_makes_is_refused(kernels):
    pretend(kernels)
    x, row = torch.rand(3, 7), torch.rand(7)
    output, total = torch.empty(3, 7), torch.empty(())
    half, of_half = x.half(), torch.empty(3, 7, dtype=torch.half)
    both = {"total": total, "output": of_half, "refused": True}
    for target in (half, row) if FP16 in DTYPES else ():
        run_pointwise(kernels, "mse", (), SUM_AND_GRAD, half, target, **both)  # 1 / n may be none of fp16
    for target in (x, row):
        run_pointwise(kernels, "mse", (), TARGET_GRAD, x, target, output=output, upstream=total, refused=True)
        run_pointwise(kernels, "mse", (), THIRD_GRAD + 1, x, target, output=output, refused=True)
        run_pointwise(kernels, "mse", (), SUM, x, target, third=row, total=total, refused=True)
    run_pointwise(kernels, "mse", (), LOSSES_OF_EACH, x, row, output=output.double(), refused=True)


def test_the_same_bits_whatever_the_order_of_blocks_and_threads(kernels):
    x, t = loss_named("huber delta=1.0").data((5, 4001), torch.float32)
    for target in (t, t[0], t.bfloat16()):
        totals = []
        for seed in range(8):
            pretend(kernels, seed)
            totals.append(torch.empty(()))
            run_pointwise(kernels, "mse", (), SUM, x, target, total=totals[-1], divisor=7.0)
        assert all(torch.equal(total, totals[0]) for total in totals)


# ---- with bugs planted


def elements(count: int):
    return lambda library: check_dense(library, BY_NAME["mse"], torch.float32, 0, count, 0, 0, 0)


def broadcast(shape: tuple[int, ...], of_target: tuple[int, ...], dtype: torch.dtype = torch.float32):
    def run(library) -> None:
        loss = BY_NAME["mse"]
        x, t = loss.data(shape, dtype)[0], loss.data(of_target, torch.float32)[1]
        check(library, loss, x, t, None, dtype != torch.float32, "a planted bug")

    return run


# name: (file, what stands there, what is put in its place, what must fail)
PLANTED = {
    "a tail left out": (
        "pointwise_dense.cuh",
        "scalar < run.scalars(); scalar += threads",
        "scalar < run.head; scalar += threads",
        elements(1001),
    ),
    "a block's sum left out": (
        "pointwise_dense.cuh",
        "sums.values[0] += double(sum);\n  }\n\n#pragma unroll 1\n  for",
        "}\n\n  for",
        elements(9000),
    ),
    "an element beyond the end": (
        "pointwise_strided.cuh",
        "k * kThreads < left; }",
        "k * kThreads <= left; }",
        broadcast((2, 128), (128,)),
    ),
    "a dimension overlooked": ("pointwise_strided.cuh", "rest[k] = quotient;", "", broadcast((6, 5, 7), (5, 1))),
    "an inverse rounded down": (
        "pointwise_strided.cuh",
        "uint64_t(divide_up(int64_t(1) << shift, size))",
        "(1ull << shift) / size",
        broadcast((6, 7), (7,)),
    ),
    "a type taken for another": (
        "pointwise_strided.cuh",
        "targets.decode(args.target.dtype",
        "targets.decode(args.input.dtype",
        broadcast((6, 7), (6, 7), torch.bfloat16),
    ),
}


@pytest.mark.deep("bugs planted in the CUDA kernels, which must fail; the kernels as they are were compared")
@pytest.mark.skipif(SANITIZED, reason="the other run does it")
def test_the_kernels_that_bugs_are_planted_in_are_right(kernels, tmp_path):
    library = rebuilt(kernels, Path(shutil.copytree(CSRC, tmp_path / "csrc")), "pointwise.cu", pointwise="mse")
    for _, _, _, run in PLANTED.values():
        run(library)


@pytest.mark.deep("bugs planted in the CUDA kernels, which must fail; the kernels as they are were compared")
@pytest.mark.skipif(SANITIZED, reason="the other run does it")
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(kernels, tmp_path, bug):
    file, old, new, run = PLANTED[bug]
    library = rebuilt(kernels, planted(tmp_path, f"cuda/{file}", old, new), "pointwise.cu", pointwise="mse")
    with pytest.raises(AssertionError):
        run(library)
