"""`linear_kl_divergence`: kl_divergence from hidden states and heads, without either side's logits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import autocast
from distillation_calls import DIRECTIONS, REDUCTIONS
from distillation_calls import TEACHERS as KINDS
from linear_calls import WITHIN, norm_error
from linear_distillation_calls import (
    NAMES,
    ROUTES,
    TEACHERS,
    call,
    exact,
    formula,
    grads,
    labels_of,
    leaves,
    operands,
    weight_of,
    with_numbers,
)
from losses import DTYPES, HALVES
from marks import needs_extension, on_cpu_alone
from observe import Recorder, peak_bytes
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fusedloss
import fusedloss.functional as L

EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)


@pytest.mark.thinned(1, deep=2)
@pytest.mark.parametrize("shape", [(23,), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("teacher_is", ["hidden states", *KINDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("grad_in_forward", [None, False])
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 100])
@pytest.mark.parametrize("of_rows", ["all", "labels", "weight", "labels and weight"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_against_float64(
    bias, of_rows, chunk_rows, grad_in_forward, reduction, dtype, teacher_is, direction, shape
):
    given = operands(shape, dtype)
    if teacher_is != "hidden states":
        given = with_numbers(given, teacher_is)
    if not bias:
        given = {name: each for name, each in given.items() if "bias" not in name}
    options: dict[str, Any] = {"direction": direction, "temperature": 1.5, "beta": 0.3, "reduction": reduction}
    options["teacher_is"] = "logits" if teacher_is == "hidden states" else teacher_is
    if "labels" in of_rows:
        options["labels"] = labels_of(shape)
    if "weight" in of_rows:
        options["weight"] = weight_of(shape, dtype)
    loss = call(given, chunk_rows, grad_in_forward=grad_in_forward, **options)
    value, expected = exact(given, **options)
    assert loss.dtype == dtype and loss.shape == value.shape
    assert norm_error(loss.detach(), value) < 2 * WITHIN[dtype]
    for got, each in zip(grads(loss, leaves(given)), expected, strict=True):
        assert got.dtype == dtype
        assert norm_error(got, each) < 2 * WITHIN[dtype]


@needs_extension
@EACH_ROUTE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_chunks_own_it_and_no_product_is_of_all_rows(dtype, route):
    given = operands(dtype=dtype)
    with Recorder() as recorder:
        call(given, **ROUTES[route])
    assert not any("softmax" in each or "kl_div.default" in each for each in recorder.seen)
    path = fusedloss.explain(L.linear_kl_divergence, **given, chunk_rows=5, **ROUTES[route])
    assert path.startswith("fused: ") and "5 chunks of 5 rows" in path
    assert fusedloss.explain(L.linear_kl_divergence, **given).endswith("pairs of rows of 11")  # few logits


@needs_extension
@EACH_ROUTE
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_gives_the_same_bits(dtype, direction, route):
    given = operands(dtype=dtype)
    loss = call(given, direction=direction, **ROUTES[route])
    first = grads(loss, leaves(given), retain_graph=True)
    kept = [each.clone() for each in first]
    for one, copy, other in zip(first, kept, grads(loss, leaves(given)), strict=True):
        assert torch.equal(one, copy) and torch.equal(one, other)


@needs_extension
@pytest.mark.parametrize("asked", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
@EACH_ROUTE
def test_what_is_frozen_has_no_gradient(route, asked):
    given = operands()
    for name, want in zip(NAMES, asked, strict=True):
        given[name].requires_grad_(bool(want))
    _, expected = exact(given, **ROUTES[route])
    for got, each in zip(grads(call(given, **ROUTES[route]), leaves(given)), expected, strict=True):
        assert norm_error(got, each) < 1e-5


@needs_extension
@EACH_ROUTE
def test_ignored_rows_may_hold_anything(route):
    given, labels = operands(), labels_of()
    out = labels == -100
    expected = grads(call(given, labels=labels, **ROUTES[route]), leaves(given))
    spoilt = {name: each.detach().clone().requires_grad_(each.requires_grad) for name, each in given.items()}
    spoilt["input"].data[out], spoilt["teacher"][out] = math.nan, math.inf
    got = grads(call(spoilt, labels=labels, **ROUTES[route]), leaves(spoilt))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not got[0][out].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_a_mean_of_no_rows_is_no_number_and_has_no_gradient(chunk_rows, direction):
    given = operands()
    labels = torch.full((23,), -100)
    for reduction in ("batchmean", "mean"):
        loss = call(given, chunk_rows, direction=direction, labels=labels, reduction=reduction)
        assert loss.isnan()
        assert not any(each.any() for each in grads(loss, leaves(given)))
    assert call(given, chunk_rows, labels=labels, reduction="sum") == 0


@pytest.mark.parametrize("teacher_is", ["hidden states", "numbers"])
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_a_teacher_that_requires_a_gradient_gets_it_natively(chunk_rows, teacher_is):
    given = operands(dtype=torch.float64)
    given = with_numbers(given) if teacher_is == "numbers" else given
    for name in TEACHERS:
        if name in given:
            given[name].requires_grad_()
    value, expected = exact(given)
    torch.testing.assert_close(call(given, chunk_rows).detach(), value)
    torch.testing.assert_close(grads(call(given, chunk_rows), leaves(given)), expected)
    if fusedloss._library.extension is not None:
        path = fusedloss.explain(L.linear_kl_divergence, **given, chunk_rows=chunk_rows)
        assert path == "native: the teacher requires a gradient"
    if teacher_is == "hidden states":  # a head that is not frozen, where nothing is differentiated
        with torch.no_grad():
            torch.testing.assert_close(call(given, chunk_rows), value)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_and_second_derivatives(reduction, direction, chunk_rows):
    given = operands((5,), torch.float64, classes=3, features=4)

    def run(*student: Tensor) -> Tensor:
        options = {"labels": labels_of((5,)), "weight": weight_of((5,)), "temperature": 1.7}
        return call(
            {**given, **dict(zip(NAMES, student, strict=True))}, chunk_rows, direction=direction, reduction=reduction,
            **options,
        )  # fmt: skip

    assert gradcheck(run, leaves(given), check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, leaves(given), fast_mode=True)


@EACH_ROUTE
def test_transforms_hooks_and_checkpoints(route):
    given = operands(dtype=torch.float64)
    options = {name: each for name, each in ROUTES[route].items() if name != "grad_in_forward"}
    own = lambda h: call({**given, "input": h}, **ROUTES[route]).sum()  # noqa: E731
    plain = lambda h: formula({**given, "input": h}, **options).sum()  # noqa: E731
    input = given["input"]
    torch.testing.assert_close(torch.func.grad(own)(input), torch.func.grad(plain)(input))
    several = torch.stack([input, 2 * input]).detach()
    torch.testing.assert_close(torch.func.vmap(own)(several), torch.func.vmap(plain)(several))
    expected = torch.autograd.grad(plain(input), leaves(given))
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: packed.append(each) or len(packed) - 1, packed.__getitem__
    ):
        loss = own(input)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(given)), expected)
    loss = checkpoint(own, input, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves(given)), expected)


@EACH_ROUTE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode, route):
    given = operands()
    with mode():
        loss = call(given, **ROUTES[route])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, call(given, **ROUTES[route]).detach())


# ---- half precision


@pytest.mark.thinned(1)
@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("teacher_is", ["hidden states", "numbers"])
@EACH_ROUTE
def test_under_autocast_products_are_in_half_precision_and_losses_in_float32(
    route, teacher_is, direction, dtype, chunk_rows
):
    given = operands()
    given = with_numbers(given) if teacher_is == "numbers" else given
    with autocast(dtype):
        loss = call(given, chunk_rows, direction=direction, **ROUTES[route])
    assert loss.dtype == torch.float32
    _, expected = exact(given, direction=direction, **ROUTES[route])
    for got, each in zip(grads(loss, leaves(given)), expected, strict=True):
        assert got.dtype == torch.float32
        assert 1e-6 < norm_error(got, each) < 2 * WITHIN[dtype]  # not made in float32


@needs_extension
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_no_further_from_float64_than_those_of_whole_logits(direction, dtype):
    given = {
        name: (each.detach() / 4).requires_grad_(each.requires_grad)
        for name, each in operands((256,), dtype, classes=700, features=32).items()
    }
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in given.items()}
    expected = torch.autograd.grad(formula(wide, direction=direction), leaves(wide))
    student, teacher = F.linear(*(given[name] for name in NAMES)), F.linear(*(given[name] for name in TEACHERS))
    whole = torch.autograd.grad(L.kl_divergence(student, teacher, direction=direction), leaves(given))
    got = torch.autograd.grad(call(given, 64, direction=direction), leaves(given))
    for ours, other, each in zip(got, whole, expected, strict=True):
        assert norm_error(ours, each) <= 1.25 * norm_error(other, each)  # each chunk's product is rounded once more


@needs_extension
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [2.0**14, 2.0**-14])
def test_a_scaled_loss_in_float16_keeps_its_gradients_in_range(scale, direction):
    """As GradScaler scales it. Of a sum of many rows the head's gradient would leave float16 first."""
    given = operands((600,), torch.float16)
    given["input"].data.mul_(3)  # the reverse divergence is then above 100 in some rows
    loss = call(given, 128, direction=direction, reduction="mean")
    got = torch.autograd.grad(loss * scale, leaves(given))
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in given.items()}
    expected = torch.autograd.grad(formula(wide, direction=direction, reduction="mean") * scale, leaves(wide))
    for one, each in zip(got, expected, strict=True):
        steps = 2.0**-24 * math.sqrt(each.numel()) / float(each.norm())  # of the smallest numbers
        assert norm_error(one, each) < 6e-3 + steps


@needs_extension
@pytest.mark.hardware(reason="its products are a CPU's, in float16, where a GPU's are in float32")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("weight", "classes", "divisor"), [(1.0, 20_000, 16), (1e6, 11, 1)])
def test_gradients_of_the_logits_in_float16_neither_vanish_nor_overflow(weight, classes, divisor, direction):
    """Of classes whose probabilities differ by 1e-7, and under weights that a mean divides by again."""
    given = operands((40,), torch.float16, classes)
    given = {name: (each.detach() / divisor).requires_grad_(each.requires_grad) for name, each in given.items()}
    options = {"direction": direction, "weight": torch.full((40,), weight)}
    got = torch.autograd.grad(2.0**10 * call(given, 16, **options), leaves(given))
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in given.items()}
    expected = torch.autograd.grad(2.0**10 * formula(wide, **options), leaves(wide))
    for one, each in zip(got, expected, strict=True):
        assert norm_error(one, each) < 3.6e-3


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_teacher_of_another_dtype(dtype):
    given = with_numbers(operands(dtype=dtype))
    given["teacher"] = given["teacher"].to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    loss = call(given)
    assert loss.dtype == torch.float32 and loss.requires_grad
    value, expected = exact(given)
    assert norm_error(loss.detach(), value) < WITHIN[dtype]
    for got, each in zip(grads(loss, leaves(given)), expected, strict=True):
        assert got.dtype == dtype and norm_error(got, each) < WITHIN[dtype]
    given["teacher"] = given["teacher"].double()
    assert fusedloss.explain(L.linear_kl_divergence, **given, chunk_rows=5) == (
        "native: a teacher of float64 beside a narrower student"
    )
    assert call(given).dtype == torch.float64


# ---- memory


@pytest.mark.thinned(1, deep=1)
@needs_extension
@on_cpu_alone("counts the CPU's memory")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"labels": labels_of((512,))}], ids="".join)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_beside_the_gradients_a_step_takes_one_chunk_of_each_side(dtype, direction, options):
    rows, chunk, classes, features = 512, 64, 32_768, 16
    given = operands((rows,), dtype, classes, features)
    given = {name: each for name, each in given.items() if "bias" not in name}
    run = lambda: call(given, chunk, direction=direction, **options).sum().backward()  # noqa: E731
    run()
    for leaf in leaves(given):
        leaf.grad = None
    gradients = sum(leaf.numel() * dtype.itemsize for leaf in leaves(given))
    chunks = 2 * chunk * classes * dtype.itemsize
    packed = rows * features * (4 if dtype in HALVES else dtype.itemsize) * 2
    # In half precision the head's gradient is summed in float32, from products for which torch copies a chunk.
    head = classes * features * (4 + dtype.itemsize) + chunks // 2 if dtype in HALVES else 0
    of_products = 3 * 2**19
    extra = peak_bytes(run) - gradients
    assert 0.9 * chunks <= extra <= chunks + packed + head + 64 * rows + of_products
    assert extra - head < rows * classes * dtype.itemsize / 3  # let alone the logits


# ---- what is refused


def test_what_does_not_fit_is_told():
    given = operands()
    numbers = with_numbers(given)["teacher"]

    def run(**changed: Any) -> Tensor:
        return L.linear_kl_divergence(**{**given, **changed})  # type: ignore[arg-type]

    for kind, words, changed in [
        (RuntimeError, "expected equal input and linear_weight last dimensions", {"linear_weight": torch.ones(11, 5)}),
        (RuntimeError, r"expected linear_bias shape \(11,\), got \(4,\)", {"linear_bias": torch.ones(4)}),
        (RuntimeError, "expected linear_weight with dimensionality 2, got 3", {"linear_weight": torch.ones(11, 2, 6),
                                                                              "linear_bias": None}),
        (ValueError, r"of shape \(23, 4\) for a teacher_weight of shape \(11, 4\), got shape \(23, 3\)",
         {"teacher": torch.ones(23, 3)}),
        (ValueError, "of the student's 11 classes, got shape", {"teacher_weight": torch.ones(10, 4)}),
        (ValueError, r"teacher_bias must be of shape \(11,\), got \(10,\)", {"teacher_bias": torch.ones(10)}),
        (ValueError, "teacher_bias needs teacher_weight", {"teacher": numbers, "teacher_weight": None}),
        (ValueError, r"logits' shape \(23, 11\), got shape \(23, 4\); hidden states need a teacher_weight",
         {"teacher_weight": None, "teacher_bias": None}),
        (ValueError, "teacher_is must be 'logits' beside a teacher_weight", {"teacher_is": "probs"}),
        (TypeError, "'teacher' must be Tensor, not tuple", {"teacher": (numbers, numbers)}),
        (ValueError, "teacher must be of a floating point dtype, got torch.int64", {"teacher": numbers.long()}),
        (ValueError, r"labels must be of the rows' shape \(23,\), got shape \(22,\)",
         {"labels": torch.ones(22).long()}),
        (ValueError, "labels must be integers, got torch.float32", {"labels": torch.ones(23)}),
        (ValueError, "weight must be of the rows' shape", {"weight": torch.ones(23, 1)}),
        (ValueError, "direction must be one of .*, got 'backward'", {"direction": "backward"}),
        (ValueError, "reduction must be one of .*, got 'median'", {"reduction": "median"}),
        (ValueError, "temperature must be positive, got 0", {"temperature": 0}),
        (TypeError, "'beta' must be float, not str", {"beta": "no"}),
        (ValueError, "chunk_rows must be at least 1, got 0", {"chunk_rows": 0}),
        (TypeError, "chunk_rows must be an int, not float", {"chunk_rows": 2.0}),
    ]:  # fmt: skip
        with pytest.raises(kind, match=words):
            run(**changed)


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_no_rows_at_all(chunk_rows):
    given = operands((0,))
    assert call(given, chunk_rows).isnan()
    assert call(given, chunk_rows, reduction="sum") == 0
    assert call(given, chunk_rows, reduction="none").shape == (0,)


def test_parameters_that_are_tensors_get_their_gradients():
    given = operands(dtype=torch.float64)
    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: call(given, temperature=t), temperature, fast_mode=True)
