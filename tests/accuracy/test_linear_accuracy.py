"""Linear losses are no further from float64 than torch's matrix product and loss, and have none of their peers' faults.

The faults are those that issues of Liger Kernel, QuACK, TRL and Cut Cross-Entropy tell of.
"""

import math
from typing import Any, NamedTuple

import linear_calls as calls
import pytest
import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from compare import upstreams
from hypothesis import example, given
from linear_calls import CLASSES, IGNORED, ROUTES, call, doubled, grads, indices, norm_error, operands, probabilities
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss.functional as L

EACH_ROUTE = pytest.mark.parametrize("route", ROUTES)


# ---- random calls


class RandomCall(NamedTuple):
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    features: int
    classes: int
    dtype: torch.dtype
    soft: bool
    reduction: str
    chunk_rows: int
    options: dict[str, Any]
    asked: tuple[bool, ...]  # of input, head and bias: which gradients
    bias: bool
    upstream: float


def random_call(choices: Choices) -> RandomCall:
    rows = choices.of([(choices.between(1, 40),), (choices.between(1, 5), choices.between(1, 8)), ()])
    options: dict[str, Any] = {}
    for name, values in {
        "label_smoothing": [0.0, 0.0, 0.1],
        "z_loss": [0.0, 0.0, 0.01],
        "softcap": [None, None, 3.0],
        "logit_scale": [1.0, 0.5, 4.0],
        "grad_in_forward": [None, False],
        "weight": [False, True],
        "sample_weight": [False, False, True],
    }.items():
        value = choices.of(values)
        if value not in (None, False, 0.0) or name == "grad_in_forward":
            options[name] = value
    bias = choices.of([True, False])
    asked = [choices.of([True, True, False]) for _ in range(3 if bias else 2)]
    if not any(asked):
        asked[0] = True
    return RandomCall(
        rows, choices.of([(), (2,)]) if rows else (), choices.between(4, 20), choices.between(4, 40),
        choices.of(DTYPES), choices.of([False, False, True]), choices.of(REDUCTIONS), choices.between(1, 50), options,
        tuple(asked), bias, choices.of([1.0, -0.5, 0.0, 3.0]),
    )  # fmt: skip


# A few numbers may be right by chance, or the difference of larger ones.
TIMES_TORCHS = 2
ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


@needs_extension
@pytest.mark.examples
@given(one_draw(random_call))
@example(RandomCall((7,), (), 3, 5, torch.bfloat16, False, "mean", 2, {"weight": True}, (True, True), False, 1.0))
def test_random_calls_are_as_exact_as_torchs(drawn: RandomCall):
    leaves = operands(drawn.rows, drawn.dtype, drawn.positions, drawn.features, drawn.classes)[: 3 if drawn.bias else 2]
    leaves = tuple(leaf.requires_grad_(want) for leaf, want in zip(leaves, drawn.asked, strict=True))
    target = (probabilities if drawn.soft else indices)(drawn.rows, drawn.positions, drawn.classes)
    if drawn.soft:
        target = target.to(drawn.dtype)
    options = dict(drawn.options)
    if "weight" in options:
        options["weight"] = (calls.drawn(drawn.classes, seed=5).abs() + 0.25).to(drawn.dtype)
    if "sample_weight" in options:
        options["sample_weight"] = calls.drawn(*drawn.rows, *drawn.positions, seed=6).abs().to(drawn.dtype)

    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def with_grads(chunk_rows: int | None) -> list[Tensor]:
        (loss,) = call(leaves, target, chunk_rows, reduction=drawn.reduction, **options)
        return [loss.detach(), *torch.autograd.grad(loss, wanted, drawn.upstream * upstreams(loss)[0])]

    got = with_grads(drawn.chunk_rows)
    exact, native = (of_logits(drawn, leaves, target, options, dtype) for dtype in (torch.float64, drawn.dtype))
    whole = with_grads(100)
    eps = torch.finfo(drawn.dtype).eps
    for ours, torchs, unchunked, each in zip(got, native, whole, exact, strict=True):
        if each.isnan().any() or not each.any():  # a mean of no row, or an upstream gradient of 0
            assert torch.equal(ours.isnan(), each.isnan())
            continue
        assert norm_error(ours, each) <= TIMES_TORCHS * norm_error(torchs, each) + ROUNDINGS[drawn.dtype] * eps
        # Sums of another order, each rounded once.
        assert norm_error(ours, unchunked.double()) <= (2 if drawn.dtype in HALVES else 64) * eps


def of_logits(
    drawn: RandomCall, leaves: tuple[Tensor, ...], target: Tensor, options: dict[str, Any], dtype: torch.dtype
) -> list[Tensor]:
    """The loss and its gradients by torch's operators in this dtype."""
    options = {name: each for name, each in options.items() if name != "grad_in_forward"}
    scale = options.pop("logit_scale", 1.0)
    options = {name: each.to(dtype) if isinstance(each, Tensor) else each for name, each in options.items()}
    given = [leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in leaves]
    z = calls.logits(*given, *([] if drawn.bias else [None]), scale)
    flat = target.to(dtype).reshape(z.shape) if drawn.soft else target.reshape(z[:, 0].shape)
    if "sample_weight" in options:
        options["sample_weight"] = options["sample_weight"].reshape(z[:, 0].shape)
    loss = calls.cross_entropy(z, flat, reduction=drawn.reduction, **options)[0].to(dtype)
    if drawn.reduction == "none":
        loss = loss.reshape(drawn.rows + drawn.positions)
    made = torch.autograd.grad(
        loss, [each for each in given if each.requires_grad], drawn.upstream * upstreams(loss)[0]
    )
    return [loss.detach(), *made]


@needs_extension
@pytest.mark.parametrize("chunk_rows", [None, 64, 512])
def test_gradients_in_bfloat16_are_closer_than_torchs(chunk_rows):
    """At the scale of a sum the target's -1 is exact, and what the losses are divided by rounds nothing."""
    leaves, target = operands((512,), torch.bfloat16, features=64, classes=2000), indices((512,), classes=2000)
    leaves = tuple((leaf.detach() / 8).requires_grad_() for leaf in leaves)
    (loss,) = call(leaves, target, chunk_rows)
    exact_leaves = doubled(leaves)
    exact = torch.autograd.grad(calls.cross_entropy(calls.logits(*exact_leaves), target)[0], exact_leaves)
    native = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), target), leaves)
    for ours, torchs, each in zip(torch.autograd.grad(loss, leaves), native, exact, strict=True):
        assert norm_error(ours, each) < 0.5 * norm_error(torchs, each)


# ---- the peers' faults


@pytest.mark.thinned(1)
@EACH_ROUTE
@pytest.mark.parametrize("chunk_rows", [None, 1, 5])
def test_each_row_has_its_own_upstream_gradient(chunk_rows, route):
    """Liger #488, #678, #872, #968: all were multiplied by the first row's."""
    leaves, target = operands(dtype=torch.float64), indices()
    options = {**ROUTES[route], "reduction": "none"}
    results = call(leaves, target, chunk_rows, **options)
    upstream = torch.arange(23, dtype=torch.float64) - 7
    upstream[0] = 0
    got = torch.autograd.grad(results[0], leaves, upstream)
    exact = F.cross_entropy(F.linear(*leaves), target, reduction="none")
    torch.testing.assert_close(got, torch.autograd.grad(exact, leaves, upstream))


@needs_extension
@pytest.mark.thinned
@EACH_ROUTE
@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.99, 0.999])
def test_the_gradient_of_a_confident_target_keeps_its_digits(p, dtype, chunk_rows, route):
    """Liger #1268: p was rounded to bfloat16 before 1 was subtracted, an error of 20 % at .99 and of 100 % at .999."""
    classes = 64
    gap = math.log(p / (1 - p) * (classes - 1))
    head = torch.zeros(classes, 1)
    head[3] = gap
    leaves = (torch.ones(4, 1, dtype=dtype).requires_grad_(), head.to(dtype).requires_grad_())
    target = torch.full((4,), 3)
    results = call(leaves, target, chunk_rows, **ROUTES[route])
    got = torch.autograd.grad(results[0].sum(), leaves)
    exact_leaves = doubled(leaves)
    exact = F.cross_entropy(
        exact_leaves[0] @ exact_leaves[1].T, target, reduction=ROUTES[route].get("reduction", "mean")
    )
    expected = torch.autograd.grad(exact.sum(), exact_leaves)
    assert abs(got[1][3].item() / expected[1][3].item() - 1) < 0.01
    assert norm_error(got[0], expected[0]) < 0.01


@needs_extension
def test_a_retained_gradient_is_scaled_once():
    """Liger and QuACK #209: what forward had made was scaled in place, so that a second backward scaled it twice."""
    leaves, target = operands(), indices()
    (loss,) = call(leaves, target)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), target), leaves)
    for factor in (4.0, 0.5, 3.0):
        got = torch.autograd.grad(loss, leaves, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(got, [factor * grad for grad in expected])


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_the_entropy_has_a_gradient(chunk_rows):
    """TRL: the entropy silently had none."""
    leaves, target = operands(dtype=torch.float64), indices()
    results = L.linear_log_probs(*leaves[:2], target, linear_bias=leaves[2], return_entropy=True, chunk_rows=chunk_rows)
    assert results[1].requires_grad
    z = calls.logits(*leaves)
    entropy = torch.distributions.Categorical(logits=z).entropy().where(target != IGNORED, 0.0)
    torch.testing.assert_close(grads([results[1]], leaves), grads([entropy], leaves))


@needs_extension
@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
@EACH_ROUTE
def test_the_bias_and_its_gradient(route, positions):
    """Cut Cross-Entropy #52: the bias was wrong. Here it is large, and the input next to nothing."""
    input, head, bias = operands(positions=positions)
    leaves = ((input.detach() * 1e-3).requires_grad_(), head, (bias.detach() * 5).requires_grad_())
    target = indices(positions=positions)
    results = call(leaves, target, **ROUTES[route])
    exact_leaves = doubled(leaves)
    z = calls.logits(*exact_leaves)
    exact = calls.cross_entropy(z, target, reduction=ROUTES[route].get("reduction", "mean"))[: len(results)]
    for got, each in zip((*results, *grads(results, leaves)), (*exact, *grads(list(exact), exact_leaves)), strict=True):
        assert norm_error(got.detach(), each.detach()) < 1e-5


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("of_input", [torch.float32, *HALVES], ids=str)
def test_autocast_takes_operands_of_any_dtype(of_input, chunk_rows, dtype):
    """Liger #305, #501: hidden states and head of different dtypes failed."""
    leaves, target = operands(), indices()
    input = leaves[0].detach().to(of_input).requires_grad_()
    given = (input, *leaves[1:])
    with torch.autocast(target.device.type, dtype):
        (loss,) = call(given, target, chunk_rows)
    assert loss.dtype == torch.float32
    for grad, leaf in zip(grads([loss], given), given, strict=True):
        assert grad.dtype == leaf.dtype and grad.isfinite().all() and grad.any()


@needs_extension
@on_cpu_alone("the products of a GPU are torch's")
@pytest.mark.parametrize("gap", [20, 25, 60])
def test_confident_rows_keep_their_digits(gap):
    """torch's chunks lose all digits at a gap of 25."""
    head = torch.zeros(CLASSES, 1)
    head[3] = gap
    leaves, target = (torch.ones(4, 1).requires_grad_(), head.requires_grad_()), torch.full((4,), 3)
    for route in ROUTES.values():
        loss = call(leaves, target, 2, **route)[0].sum()
        exact = (CLASSES - 1) * math.exp(-gap) * (4 if "reduction" in route else 1)
        assert math.isclose(loss.item(), exact, rel_tol=1e-5)
        (of_head,) = torch.autograd.grad(loss, leaves[1:])
        assert math.isclose(of_head[3].item(), -exact, rel_tol=1e-5)
