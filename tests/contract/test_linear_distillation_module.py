"""`LinearDistillationLoss`: a teacher's and the labels' share of the same chunks of logits."""

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation_calls import DIRECTIONS, reduced, rows
from linear_calls import WITHIN, norm_error
from linear_distillation_calls import NAMES, TEACHERS, grads, leaves, operands, weight_of, with_numbers
from losses import DTYPES, HALVES
from marks import needs_extension, on_cpu_alone
from observe import peak_bytes
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import fusedloss

ROUTES = {"in forward": "batchmean", "a sum": "sum", "each row": "none"}


def labels_of(shape: tuple[int, ...] = (23,), classes: int = 11) -> Tensor:
    labels = torch.randint(classes, shape, generator=torch.Generator("cpu").manual_seed(3), device="cpu")
    labels.view(-1)[1::5] = -100
    return labels.to(torch.get_default_device())


def criterion_of(given: dict[str, Tensor], **options: Any) -> fusedloss.LinearDistillationLoss:
    """Its head is the operands' own."""
    weight, bias = given["linear_weight"], given["linear_bias"]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.weight, head.bias = (nn.Parameter(each.detach()) for each in (weight, bias))
    return fusedloss.LinearDistillationLoss.from_linear(head, **{"chunk_rows": 5, **options})


def call(given: dict[str, Tensor], labels: Tensor, weight: Tensor | None = None, **options: Any) -> tuple[Any, Any]:
    """The loss, and what it is differentiated by."""
    criterion = criterion_of(given, **options)
    of_teacher = {name: given[name] for name in TEACHERS[1:] if name in given}
    loss = criterion(given["input"], given["teacher"], labels, weight, **of_teacher)
    return loss, [given["input"], criterion.linear.weight, criterion.linear.bias]


def formula(
    wide: dict[str, Tensor], labels: Tensor, weight: Tensor | None = None, alpha: float = 0.5,
    direction: str = "forward", reduction: str = "batchmean", temperature: float = 2.0, beta: float = 0.5,
) -> Tensor:  # fmt: skip
    z = F.linear(*(wide[name] for name in NAMES))
    teacher = F.linear(*(wide[name] for name in TEACHERS)) if "teacher_weight" in wide else wide["teacher"]
    kept, classes = labels != -100, z.shape[-1]
    soft = reduced(rows(z, teacher, direction, "logits", temperature, beta), classes, reduction, kept, weight)
    hard = F.cross_entropy(z.reshape(-1, classes), labels.reshape(-1), reduction="none").view(labels.shape)
    return alpha * temperature**2 * soft + (1 - alpha) * reduced(hard, classes, reduction, kept, weight)


def compare(given: dict[str, Tensor], within: float, **options: Any) -> None:
    chunk_rows = options.pop("chunk_rows", 5)
    loss, of = call(given, chunk_rows=chunk_rows, **options)
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in given.items()}
    exact = formula(wide, **options)
    assert norm_error(loss.detach(), exact.detach()) < within
    for got, each in zip(grads(loss, of), grads(exact, leaves(wide)), strict=True):
        assert norm_error(got, each) < within


@pytest.mark.thinned(1, deep=2)
@pytest.mark.parametrize("teacher", ["hidden states", "numbers"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(23,), (2, 3, 4)], ids=str)
def test_both_parts_in_their_shares(shape, dtype, chunk_rows, weighted, alpha, route, direction, teacher):
    given = operands(shape, dtype)
    given = with_numbers(given) if teacher == "numbers" else given
    weight = weight_of(shape, dtype) if weighted else None
    compare(
        given, 2 * WITHIN[dtype], labels=labels_of(shape), weight=weight, alpha=alpha, direction=direction, beta=0.2,
        reduction=ROUTES[route], temperature=3.0, chunk_rows=chunk_rows,
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [0.001, 0.99])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shares_that_differ_much(direction, dtype, alpha):
    options = {"alpha": alpha, "direction": direction, "temperature": 1.0}
    compare(operands(dtype=dtype), 2 * WITHIN[dtype], labels=labels_of(), **options)


@needs_extension
@on_cpu_alone("counts the operators of the CPU")
def test_both_parts_share_the_products():
    given = operands()
    made: list[Tensor] = []

    def step() -> None:
        loss, of = call(given, labels_of().clamp_min(0), chunk_rows=23)
        made.extend(torch.autograd.grad(loss, of))

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    products = [event for event in profiled.events() if event.name.startswith(("aten::mm", "aten::addmm"))]
    assert len(products) == 5  # the logits of both sides, and the gradients of input, head and bias


@needs_extension
@on_cpu_alone("counts the CPU's memory")
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_beside_the_gradients_a_step_takes_three_chunks(reduction):
    size, chunk, classes, features = 512, 64, 32_768, 16
    given = operands((size,), torch.float32, classes, features)
    criterion = criterion_of(given, chunk_rows=chunk, reduction=reduction)
    labels, of_teacher = labels_of((size,), classes), {name: given[name] for name in TEACHERS[1:]}
    step = lambda: criterion(given["input"], given["teacher"], labels, **of_teacher).sum().backward()  # noqa: E731
    step()
    criterion.zero_grad()
    given["input"].grad = None
    gradients = sum(each.numel() * 4 for each in (given["input"], *criterion.parameters()))
    extra = peak_bytes(step) - gradients
    one = chunk * classes * 4
    assert 2.7 * one <= extra <= 3 * one + 3 * 2**19 + 256 * size


@needs_extension
@pytest.mark.parametrize("route", ROUTES)
def test_a_second_backward_and_second_derivatives(route):
    given, labels = operands((5,), torch.float64, classes=3, features=4), labels_of((5,), 3)
    loss, of = call(given, labels, chunk_rows=2, reduction=ROUTES[route])
    first = [each.clone() for each in grads(loss, of, retain_graph=True)]
    torch.testing.assert_close(grads(loss, of, retain_graph=True), first, rtol=0, atol=0)
    torch.testing.assert_close(grads(loss, of, create_graph=True), first)
    criterion = criterion_of(given, chunk_rows=2, reduction=ROUTES[route], direction="jsd")

    def run(input: Tensor, weight: Tensor) -> Tensor:
        of_teacher = {name: given[name] for name in TEACHERS[1:]}
        arguments = (input, given["teacher"], labels)
        loss: Tensor = torch.func.functional_call(criterion, {"linear.weight": weight}, arguments, of_teacher)
        return loss

    operands_of = (given["input"], given["linear_weight"])
    assert gradcheck(run, operands_of, fast_mode=True) and gradgradcheck(run, operands_of, fast_mode=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_autocast(dtype):
    given = operands()
    with torch.autocast(torch.get_default_device().type, dtype):
        loss, of = call(given, labels_of())
    assert loss.dtype == torch.float32
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in given.items()}
    for got, each in zip(grads(loss, of), grads(formula(wide, labels_of()), leaves(wide)), strict=True):
        assert got.dtype == torch.float32 and norm_error(got, each) < 2 * WITHIN[dtype]


@needs_extension
def test_compiled_whole():
    given, labels = operands(), labels_of()
    criterion = criterion_of(given)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    of_teacher = {name: given[name] for name in TEACHERS[1:]}
    of = [given["input"], *criterion.parameters()]
    results = [run(given["input"], given["teacher"], labels, **of_teacher) for run in (criterion, compiled)]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(grads(results[1], of), grads(results[0], of))


def test_torch_fx_holds_it_as_one_call():
    given, labels = operands(), labels_of()
    criterion = criterion_of(given)
    numbers = with_numbers(given)["teacher"]
    traced = torch.fx.symbolic_trace(criterion)
    assert [getattr(node.target, "__name__", "") for node in traced.graph.nodes].count("distilled") == 1
    assert not any("linear" in node.target.__name__ for node in traced.graph.nodes if node.op == "call_function")
    assert torch.equal(traced(given["input"], numbers, labels), criterion(given["input"], numbers, labels))


def test_it_is_a_module_like_others():
    criterion = fusedloss.LinearDistillationLoss(6, 11, bias=True, alpha=0.7, chunk_rows=4)
    assert set(criterion.state_dict()) == {"linear.weight", "linear.bias"}
    assert "chunk_rows=4" in repr(criterion) and "(linear): Linear" in repr(criterion)
    given, labels = operands(), labels_of()
    numbers = with_numbers(given)["teacher"]
    again = pickle.loads(pickle.dumps(criterion))
    assert torch.equal(again(given["input"], numbers, labels), criterion(given["input"], numbers, labels))
    with pytest.raises(ValueError, match="labels may be left out only where alpha is 1, got alpha=0.7"):
        criterion(given["input"], numbers)
    with pytest.raises(ValueError, match=r"labels must be of the rows' shape \(23,\), got shape \(22,\)"):
        criterion(given["input"], numbers, labels[:22])
    with pytest.raises(IndexError, match="Target 11 is out of bounds"):
        criterion(given["input"], numbers, torch.full_like(labels, 11))
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2.0"):
        fusedloss.LinearDistillationLoss(6, 11, alpha=2.0)
