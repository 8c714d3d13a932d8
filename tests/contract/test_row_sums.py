"""The losses of whole rows, cosine embedding, triplets and multi-margin: torch's results, gradients and errors."""

import copy
import inspect
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import autocast, error, outcome, same, upstream_of, value_and_grads, warned
from layouts import LAYOUTS, laid_out
from losses import DTYPES, HALVES, ON_EXECUTOR, REDUCTIONS
from marks import needs_extension, not_under_a_default_device, on_cpu_alone
from observe import Recorder, compiled_with_ops
from pointwise_calls import assert_reduction_as_in_torch, random
from row_sums_calls import ALL, CALLS, EVERY_DTYPE, EVERY_FUNCTION, MODULES, OPS, double, fused, made, of, refused
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

HAS_EXTENSION = fusedloss._library.extension is not None


def alike(run: Any, **tolerance: Any) -> Any:
    """Holds what it gives, or raises, for our functions against torch's; returns torch's."""
    ours, torchs = warned(lambda: run(L))[0], warned(lambda: run(F))[0]
    if raised(torchs):
        assert ours == torchs
    else:
        same(ours, torchs, **tolerance)
    return torchs


def raised(result: Any) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


# ---- values, dtypes

SIZES = [((30,), 7), ((5,), 32), ((9,), 45), ((3,), 1100), ((4,), 1), ((), 12)]


@pytest.mark.parametrize("rows, columns", SIZES, ids=str)
@EVERY_DTYPE
@ALL
def test_value_and_gradients_against_float64(call, dtype, rows, columns):
    operands, given = made(call, rows, columns, dtype)
    assert not HAS_EXTENSION or fused(call, operands, given) != refused(call, dtype)
    for reduction in REDUCTIONS:
        exact = value_and_grads(of(F, call, double(given), reduction=reduction), *(each.double() for each in operands))
        if refused(call, dtype):
            ours = alike(lambda f: of(f, call, given, reduction=reduction)(*operands))  # noqa: B023
            assert ours[0] is NotImplementedError
            continue
        got = value_and_grads(of(L, call, given, reduction=reduction), *operands)
        assert all(each.dtype == dtype for each in got)
        # A triplet's loss is a difference of distances, and a gradient one of terms of about 1. That by the target's
        # score is a sum, which torch adds up one by one.
        largest = columns if "norm 1" in call else math.sqrt(columns)
        rounding = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        for one, other, scale in zip(got, exact, [largest, *[max(1, columns / 100)] * len(operands)], strict=True):
            of_result = torch.finfo(dtype).eps * (1 if dtype in HALVES else 32)
            same(one.double(), other, rtol=of_result, atol=rounding * scale * (30 if reduction == "sum" else 1))


@ALL
def test_every_choice_of_operands_that_require_a_gradient(call):
    operands, given = made(call, (9,), 40, torch.float64)
    for wanted, reduction in itertools.product(itertools.product([False, True], repeat=len(operands)), REDUCTIONS):
        results = []
        for functions in (L, F):
            leaves = [each.clone().requires_grad_(want) for each, want in zip(operands, wanted, strict=True)]
            value = of(functions, call, given, reduction=reduction)(*leaves)
            assert value.requires_grad == any(wanted)
            if any(wanted):
                value.backward(upstream_of(value))
            results.append([value.detach(), *(leaf.grad for leaf in leaves)])
        for ours, torchs in zip(*results, strict=True):
            assert (ours is None) == (torchs is None)
            same(ours, torchs) if ours is not None else None


OTHERS = [*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]
ROUGHLY = {"rtol": 0.1, "atol": 0.1}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@EVERY_FUNCTION
def test_dtypes_of_result_and_gradients(function, dtype):
    if ON_EXECUTOR and function == "multi_margin_loss" and dtype in HALVES:
        pytest.skip("there torch's own runs on the CPU, which refuses them")
    call = next(each for each in CALLS if CALLS[each][0] == function)
    for other, labels in itertools.product(OTHERS, OTHERS if function == "cosine_embedding_loss" else [None]):
        (first, *others), given = made(call, (6,), 5, torch.float64)
        first, others = first.to(dtype), [each.to(other) for each in others]
        given = {**given, **({"target": given["target"].to(labels)} if labels is not None else {})}
        if "target" in given and not others:
            given["target"] = given["target"].to(other)

        def run(functions, operands=(first, *others), given=given):
            leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in operands]
            value = of(functions, call, given, reduction="none")(*leaves)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            return [value.detach(), *(torch.autograd.grad(value.sum(), wanted) if wanted else [])]

        half = {dtype, other, labels} & set(HALVES)
        ours, torchs = (warned(lambda: run(f))[0] for f in (L, F))  # noqa: B023
        if raised(torchs):
            assert ours == torchs, (other, labels)
        else:
            assert [each.dtype for each in ours] == [each.dtype for each in torchs], (other, labels)
            same(ours, torchs, **(ROUGHLY if half else {}))


@needs_extension
@EVERY_DTYPE
def test_labels_that_run_fused(dtype):
    operands, given = made("cosine", (6,), 5, dtype)
    for labels in OTHERS:
        run = fused("cosine", operands, {**given, "target": given["target"].to(labels)})
        assert run == (labels not in (torch.uint8, torch.bool, torch.complex64)), labels


def test_labels_are_compared_in_their_own_dtype():
    x = torch.eye(3)
    labels = torch.tensor([1 + 1e-12, 1.0, -1 - 1e-12], dtype=torch.float64)
    assert alike(lambda f: f.cosine_embedding_loss(x, x.flip(0), labels, reduction="none")).tolist() == [0, 0, 0]
    large = torch.tensor([2**40 + 1, 2**40 - 1, 1])
    alike(lambda f: f.cosine_embedding_loss(x, x.flip(0), large, reduction="none"))


# ---- shapes, strides

PAIRS = [
    ((3, 4), (3, 4), (3,)), ((3, 4), (1, 4), (3,)), ((3, 4), (3, 1), (3,)), ((4,), (4,), ()), ((4,), (1,), ()),
    ((3, 4), (3, 4), (1,)), ((1, 4), (1, 4), (3,)), ((3, 4), (4,), (3,)), ((3, 4), (3, 4), ()), ((4,), (4,), (1,)),
    ((2, 3, 4), (2, 3, 4), (2,)), ((2, 3, 4), (2, 3, 4), (2, 3)), ((), (), ()), ((0, 4), (0, 4), (0,)),
    ((3, 0), (3, 0), (3,)), ((3, 4), (3, 5), (3,)), ((3, 4), (2, 4), (3,)), ((3, 4), (3, 4), (2,)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", PAIRS, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes_of_cosines(shapes, reduction):
    x1, x2, y = (random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    alike(
        lambda f: value_and_grads(
            lambda a, b: f.cosine_embedding_loss(a, b, y.sign(), 0.2, reduction=reduction), x1, x2
        )
    )


SHAPES = [(), (4,), (1,), (3, 4), (1, 4), (3, 1), (2, 3, 4), (1, 3, 4), (2, 1, 4), (0,), (0, 4), (3, 0), (3, 5)]


@pytest.mark.parametrize("of_anchor", SHAPES, ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_shapes_of_triplets(of_anchor, swap):
    for of_positive, of_negative in itertools.product(SHAPES, repeat=2):
        operands = [random(*shape, seed=seed) for seed, shape in enumerate((of_anchor, of_positive, of_negative))]
        for reduction in ("mean", "none"):
            alike(
                lambda f: value_and_grads(
                    lambda *each: f.triplet_margin_loss(*each, swap=swap, reduction=reduction),  # noqa: B023
                    *operands,  # noqa: B023
                )
            )


@pytest.mark.parametrize("of_input", [(3, 4), (4,), (1, 4), (1,), (1, 1), (), (2, 3, 4), (3, 0), (0,)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_shapes_of_margins(of_input, weighted):
    for of_target in [(), (1,), (3,), (2,), (1, 1), (3, 1), (2, 3), (0,)]:
        x, y = random(*of_input), torch.zeros(of_target, dtype=torch.int64)
        for size, reduction in itertools.product(of_input[-1:] + (1, 2) if weighted else [None], ("mean", "none")):
            weight = None if size is None else torch.full((size,), 1.5, dtype=torch.float64)
            alike(
                lambda f: value_and_grads(
                    lambda x: f.multi_margin_loss(x, y, weight=weight, reduction=reduction),  # noqa: B023
                    x,  # noqa: B023
                )
            )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@ALL
def test_no_rows(call, reduction):
    operands, given = made(call, (0,), 4, torch.float32)
    if "margins" in call and reduction == "sum":
        return  # torch leaves its result unwritten
    alike(lambda f: value_and_grads(of(f, call, given, reduction=reduction), *operands))


@pytest.mark.parametrize("layout", LAYOUTS)
@ALL
def test_layouts(call, layout):
    for rows in ((6,), (2, 3)) if "triplet" in call else ((6,),):
        operands, given = made(call, rows, 40, torch.float64)
        for others in {layout, "contiguous"}:
            tensors = [laid_out(operands[0], layout), *(laid_out(each, others) for each in operands[1:])]
            for reduction in ("mean", "none"):
                results = []
                for functions, each in ((L, tensors), (F, tensors)):
                    leaves = [tensor.detach().requires_grad_() for tensor in each]
                    value = of(functions, call, given, reduction=reduction)(*leaves)
                    results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
                same(*results, check_stride="expanded" not in layout)


@needs_extension
@ALL
def test_rows_apart_run_fused_and_columns_apart_do_not(call):
    operands, given = made(call, (6,), 40, torch.float32)
    for layout, expected in (
        ("misaligned", True), ("every other row", True), ("expanded rows", True), ("transposed", False),
        ("every other column", False),
    ):  # fmt: skip
        assert fused(call, [laid_out(each, layout) for each in operands], given) == expected, layout


# ---- gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_gradcheck(call, reduction):
    operands, given = made(call, (3,), 4, torch.float64)
    leaves = [each.requires_grad_() for each in operands]
    assert gradcheck(of(L, call, given, reduction=reduction), leaves)
    if "margins" not in call:  # torch's has no second derivative
        assert gradgradcheck(of(L, call, given, reduction=reduction), leaves)


@ALL
def test_second_derivatives_are_torchs(call):
    operands, given = made(call, (4,), 3, torch.float32)

    def run(functions):
        leaves = [each.clone().requires_grad_() for each in operands]
        grads = torch.autograd.grad(of(functions, call, given)(*leaves), leaves, create_graph=True)
        penalty = sum((grad.square() * (1 + i)).sum() for i, grad in enumerate(grads))
        return [*(grad.detach() for grad in grads), *torch.autograd.grad(penalty, leaves, allow_unused=True)]

    assert raised(alike(run)) == ("margins" in call)


@ALL
def test_a_batch_of_upstream_gradients(call):
    operands, given = made(call, (3,), 2, torch.float64)

    def run(functions):
        leaves = [each.clone().requires_grad_() for each in operands]
        value = of(functions, call, given, reduction="none")(*leaves)
        return torch.autograd.grad(value, leaves, random(5, 3, seed=9), is_grads_batched=True)

    alike(run)


@ALL
def test_torch_func(call):
    operands, given = made(call, (4,), 5, torch.float64)
    every = tuple(range(len(operands)))
    alike(lambda f: torch.func.grad(of(f, call, given), every)(*operands))
    rows = {name: each for name, each in given.items() if name == "target"}
    rest = {name: each for name, each in given.items() if name != "target"}

    def each_row(f):
        run = lambda rows, *operands: of(f, call, {**rest, **rows})(*operands)  # noqa: E731
        return torch.func.vmap(run)(rows, *operands)

    alike(each_row)
    alike(lambda f: torch.func.jvp(of(f, call, given), tuple(operands), tuple(each.cos() for each in operands)))


@needs_extension
@ALL
def test_a_step_is_two_passes(call):
    operands, given = made(call, (50,), 40, torch.float32)
    leaves = [each.requires_grad_() for each in operands]
    with Recorder() as recorder:
        of(L, call, given)(*leaves).backward()
    name = f"fusedloss.{OPS[CALLS[call][0]]}"
    ops = [op.removesuffix(".default") for op in recorder.seen]
    assert [op for op in ops if op.startswith("fusedloss")] == [name, f"{name}_backward"]
    assert {op for op in ops if not op.startswith("fusedloss")} <= {"aten.ones_like", "aten.detach"}


@needs_extension
@ALL
def test_the_same_bits_for_any_number_of_threads(call, threads):
    operands, given = made(call, (700,), 130, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(value_and_grads(of(L, call, given, reduction="mean"), *operands))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# ---- edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cosines_at_the_margin(dtype):
    x1 = torch.tensor([[1, 0], [1, 0], [0, 1], [3, 4], [0, 0], [0, 0]], dtype=dtype)
    x2 = torch.tensor([[0, 1], [2, 0], [0, -1], [4, 3], [1, 1], [0, 0]], dtype=dtype)
    for label, margin in itertools.product((1, -1, 0), (0.0, 1.0, -1.0, 0.5)):
        y = torch.full((6,), label)
        alike(
            lambda f: value_and_grads(
                lambda a, b: f.cosine_embedding_loss(a, b, y, margin, reduction="none"),  # noqa: B023
                x1, x2,
            )
        )  # fmt: skip


def test_a_row_of_zeros_in_float16_is_right_where_torchs_is_nan():
    x1, x2 = torch.zeros(2, 3).half(), torch.ones(2, 3).half()
    y = torch.tensor([1, -1])
    assert F.cosine_embedding_loss(x1, x2, y, -0.5, reduction="none").isnan().any()
    assert L.cosine_embedding_loss(x1, x2, y, -0.5, reduction="none").tolist() == [1.0, 0.5]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_triplets_at_the_margin(p, swap, dtype):
    """Distances of 0, hinges of exactly 0, and as many equal distances."""
    points = torch.tensor([[0, 0], [1, 0], [0, 1], [2, 0], [-1, 0]], dtype=dtype)
    a, b, c = (torch.stack(each) for each in zip(*itertools.product(points, repeat=3), strict=True))
    for eps, margin in itertools.product((0.0, 1e-6, 1.0), (1.0, 2.0, 0.5)):
        alike(
            lambda f: value_and_grads(
                lambda *each: f.triplet_margin_loss(*each, margin, p, eps, swap, reduction="none"),  # noqa: B023
                a, b, c,
            )
        )  # fmt: skip


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_margins_at_the_margin(p, dtype):
    x = torch.tensor(list(itertools.product((0.0, 0.5, 1.0, 1.5), repeat=3)), dtype=dtype)
    for target, margin in itertools.product(range(3), (1.0, 0.5, 0.0, -0.5)):
        y = torch.full((len(x),), target)
        alike(
            lambda f: value_and_grads(lambda x: f.multi_margin_loss(x, y, p, margin, reduction="none"), x)  # noqa: B023
        )


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@ALL
def test_odd_numbers(call, dtype, odd):
    operands, given = made(call, (12,), 5, dtype)
    for which, operand in enumerate(operands):
        for row in range(4):
            operand[4 * which + row, row] = odd
    if "margins" in call:
        operands[0][4:8] = odd
    ours, torchs = (value_and_grads(of(f, call, given, reduction="none"), *operands) for f in (L, F))
    if call == "cosine" and odd == 1e30 and dtype == torch.float32:  # squares overflow, and torch's gradient is NaN
        ours = [
            torch.where(other.isnan() & one.isfinite(), other, one) for one, other in zip(ours, torchs, strict=True)
        ]
    same(ours, torchs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("index", [-1, 5, -100, 2**40])
@on_cpu_alone("on a GPU the loss is NaN and check() raises: gpu/")
def test_a_class_out_of_range_is_refused(index, reduction):
    for rows, where in ((7, 3), (40000, 39999)):
        x, y = random(rows, 5).float(), torch.zeros(rows, dtype=torch.int64)
        y[where] = index
        for leaf in (False, True):
            ours, torchs = (
                outcome(lambda: f.multi_margin_loss(x.clone().requires_grad_(leaf), y, reduction=reduction))  # noqa: B023
                for f in (L, F)
            )
            assert ours == torchs == (RuntimeError, "target out of range")


def test_a_weight_that_is_refused():
    x, y = random(4, 5).float(), torch.tensor([0, 1, 2, 3])
    for weight in (
        torch.ones(5, dtype=torch.float64), torch.ones(4), torch.ones(1, 5), torch.ones(5, requires_grad=True),
        torch.ones(()), [1.0] * 5, 2.0,
    ):  # fmt: skip
        assert raised(alike(lambda f: f.multi_margin_loss(x, y, weight=weight)))  # noqa: B023


def test_weights_that_lie_apart():
    x, y = random(4, 5).float(), torch.tensor([0, 1, 2, 3])
    weight = (random(5, 2).abs()[:, 0]).float()
    alike(lambda f: value_and_grads(lambda x: f.multi_margin_loss(x, y, weight=weight), x))


# ---- autocast


NOT_ON_THE_EXECUTOR = pytest.mark.skipif(ON_EXECUTOR, reason="torch's autocast does not know the executor's device")


@NOT_ON_THE_EXECUTOR
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@ALL
def test_autocast_gives_float32_no_less_exact_than_torchs(call, dtype):
    for reduction in REDUCTIONS:
        operands, given = made(call, (40,), 30, dtype)
        exact = value_and_grads(of(F, call, double(given), reduction=reduction), *(each.double() for each in operands))
        with autocast(dtype):
            assert not HAS_EXTENSION or fused(call, operands, given, reduction=reduction)
            ours, torchs = (value_and_grads(of(f, call, given, reduction=reduction), *operands) for f in (L, F))
        assert ours[0].dtype == torchs[0].dtype == torch.float32
        for got, of_torch, expected in zip(ours, torchs, exact, strict=True):
            assert got.dtype == of_torch.dtype
            hair = 8 * 2**-24 if got.dtype == torch.float32 else 0.01 * torch.finfo(dtype).eps
            assert error(got, expected) <= error(of_torch, expected) + hair


@NOT_ON_THE_EXECUTOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@ALL
def test_autocast_gives_torchs_dtypes(call, dtype):
    for other in (torch.float32, torch.float64, torch.bfloat16):
        (first, *others), given = made(call, (4,), 3, dtype)
        operands = [first, *(each.to(other) for each in others)]
        if "weight" in given:
            given = {**given, "weight": given["weight"].to(other)}
        with autocast(torch.bfloat16):
            ours, torchs = (outcome(lambda: of(f, call, given, reduction="none")(*operands)) for f in (L, F))  # noqa: B023
        assert ours == torchs, other


# ---- arguments


@pytest.mark.parametrize("size_average, reduce", [*itertools.product([None, True, False], repeat=2)][1:])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@EVERY_FUNCTION
@not_under_a_default_device
def test_size_average_and_reduce(function, size_average, reduce, reduction):
    call = next(each for each in CALLS if CALLS[each][0] == function)
    operands, given = made(call, (4,), 3, torch.float32)
    legacy = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    target = [given["target"]] if "target" in given else []
    for make in (
        lambda of, modules: getattr(of, function)(*operands, *target, **legacy),
        lambda of, modules: getattr(modules, MODULES[function])(**legacy)(*operands, *target),
    ):
        ours, torchs = (warned(lambda: make(*each)) for each in ((L, fusedloss), (F, nn)))  # noqa: B023
        same(ours[0], torchs[0])
        assert [each[:2] for each in ours[1]] == [each[:2] for each in torchs[1]] != []


@pytest.mark.parametrize("reduction", ["foo", "elementwise_mean", "Mean", "batchmean", None, 1, ["mean"]], ids=str)
@ALL
@not_under_a_default_device
def test_unusual_reductions(call, reduction):
    operands, given = made(call, (4,), 3, torch.float32)
    function = CALLS[call][0]
    assert_reduction_as_in_torch(function, MODULES[function], operands, given, reduction)
    if function != "cosine_embedding_loss":  # what else is wrong comes after it
        wrong = {"triplet_margin_loss": {"margin": 0.0}, "multi_margin_loss": {"p": 3}}[function]
        alike(lambda f: of(f, call, {**given, **wrong}, reduction=reduction)(*operands))


ODD = [1, True, False, 2.0, "1", None, 1j, torch.tensor(0.5, device="cpu"), math.inf, -math.inf, math.nan, 0.0, -1.0]
ODD += [1e30, 10**400, 3, 1.5]
PARAMETERS = [
    ("cosine", "margin"), ("triplet", "margin"), ("triplet", "p"), ("triplet", "eps"), ("triplet", "swap"),
    ("margins", "p"), ("margins", "margin"),
]  # fmt: skip


@pytest.mark.parametrize("parameter", ODD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("call, name", PARAMETERS)
@not_under_a_default_device
def test_parameters(call, name, parameter):
    operands, given = made(call, (4,), 3, torch.float32)
    for reduction in ("mean", "none"):
        alike(lambda f: of(f, call, {**given, name: parameter}, reduction=reduction)(*operands))  # noqa: B023


@EVERY_FUNCTION
def test_what_is_no_tensor(function):
    one = torch.ones(2)
    for operands in itertools.product((one, [1.0, 1.0], 1.0, None), repeat=2 if "multi" in function else 3):
        alike(lambda f: getattr(f, function)(*operands))  # noqa: B023


@EVERY_FUNCTION
def test_the_signature_is_torchs(function):
    ours, torchs = (inspect.signature(getattr(f, function)).parameters for f in (L, F))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in torchs.values()
    ]


@needs_extension
def test_what_runs_natively_and_why():
    x, y = random(4, 5), torch.tensor([1, -1, 1, -1])
    why = lambda function, *given, **more: fusedloss.explain(getattr(L, function), *given, **more)  # noqa: E731
    assert why("cosine_embedding_loss", x, x, y).startswith("fused: ")
    assert why("cosine_embedding_loss", x, x, y).endswith("4 rows of 5")
    assert why("cosine_embedding_loss", x, x[:1], y) == "native: inputs of different shapes"
    assert why("cosine_embedding_loss", x, x.float(), y) == "native: inputs of different dtypes"
    assert why("cosine_embedding_loss", x.T, x.T, y.new_ones(5)) == "native: rows whose columns do not lie side by side"
    assert why("triplet_margin_loss", x, x, x, p=3) == "native: a parameter that is out of range"
    assert why("triplet_margin_loss", x, x, x, p=1.5) == "native: a norm for which there is no kernel"
    assert why("triplet_margin_loss", x, x, x, swap=1) == "native: a choice that is no bool"
    assert why("multi_margin_loss", x, y.int()) == "native: class indices that are not int64"


# ---- modules

CONSTRUCTED: dict[str, tuple[str, Any]] = {
    "cosine": ("cosine", lambda of: of.CosineEmbeddingLoss()),
    "cosine, positional": ("cosine", lambda of: of.CosineEmbeddingLoss(0.5, None, None, "sum")),
    "triplet": ("triplet", lambda of: of.TripletMarginLoss()),
    "triplet, positional": ("triplet", lambda of: of.TripletMarginLoss(0.5, 1.0, 1e-3, True, None, None, "none")),
    "margins": ("margins", lambda of: of.MultiMarginLoss()),
    "margins, weight": ("margins", lambda of: of.MultiMarginLoss(2, 0.5, torch.ones(3, dtype=torch.float64) / 3)),
}


@pytest.mark.parametrize("name", CONSTRUCTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_is_torchs(name):
    call, make = CONSTRUCTED[name]
    ours, native = make(fusedloss), make(nn)
    assert isinstance(ours, type(native)) and type(ours).__name__ == type(native).__name__
    assert repr(ours) == repr(native) and set(vars(native)) == set(vars(ours))
    assert list(ours.state_dict()) == list(native.state_dict())
    operands, given = made(call, (4,), 3, torch.float64)
    target = [given["target"]] if "target" in given else []
    expected = value_and_grads(lambda *each: native(*each, *target), *operands)
    for each in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(each) is type(ours)
        same(value_and_grads(lambda *x: each(*x, *target), *operands), expected)  # noqa: B023
    same(torch.jit.script(ours)(*operands, *target), expected[0])
    for module in (ours, native):
        module.reduction = "foo"
    assert outcome(lambda: ours(*operands, *target)) == outcome(lambda: native(*operands, *target))


def test_constructors_refuse_what_torchs_do():
    for make in (
        lambda of: of.TripletMarginLoss(0.0), lambda of: of.TripletMarginLoss(-1),
        lambda of: of.MultiMarginLoss(3), lambda of: of.MultiMarginLoss(weight=torch.ones(2, 2)),
    ):  # fmt: skip
        ours, torchs = (outcome(lambda: make(of)) for of in (fusedloss, nn))  # noqa: B023
        assert ours == torchs


# ---- under torch.compile


@needs_extension
@pytest.mark.deep("every form of these losses compiled; compiled/ compiled one of each")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_compile_gives_eagers_results(call, reduction):
    operands, given = made(call, (150,), 120, torch.float32)
    run = of(L, call, given, reduction=reduction)
    compiled, ops = compiled_with_ops(run)
    same(value_and_grads(compiled, *operands), value_and_grads(run, *operands))
    assert any(op.startswith(f"fusedloss.{OPS[CALLS[call][0]]}") for op in ops)


@needs_extension
@ALL
def test_export_keeps_the_op_and_decomposes_it(call):
    operands, given = made(call, (6,), 5, torch.float32)

    class Model(nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return of(L, call, given)(*operands)

    exported = torch.export.export(Model(), tuple(operands))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert f"fusedloss.{OPS[CALLS[call][0]]}.default" in targets
    same(exported.module()(*operands), Model()(*operands))
    decomposed = exported.run_decompositions()
    assert not any("fusedloss" in str(node.target) for node in decomposed.graph.nodes)
    same(decomposed.module()(*operands), Model()(*operands))
