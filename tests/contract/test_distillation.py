"""`kl_divergence`: a student's rows against a teacher's, in three directions."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, autocast, upstreams
from distillation_calls import DIRECTIONS, REDUCTIONS, TEACHERS, pair, reduced, rows
from losses import DTYPES, HALVES
from marks import needs_extension, on_cpu_alone
from observe import Recorder, bytes_allocated
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

# (3, 2500) has three blocks of a row, (2, 3, 7) more dimensions.
SHAPES = [(6, 5), (2, 3, 7), (9,), (3, 2500), (40, 33)]


def labels_of(student: Tensor) -> Tensor:
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64, device=student.device)
    if labels.numel() > 1:
        labels.view(-1)[1::4] = -100
    return labels


def weight_of(student: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(3)
    weight = torch.rand(student.shape[:-1], generator=generator, device="cpu") + 0.5
    if weight.numel() > 2:
        weight.view(-1)[2] = 0
    return weight.to(student.device)


@pytest.mark.thinned
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("teacher_is", TEACHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("of_rows", ["all", "labels", "weight", "labels and weight"])
def test_values_and_gradients_against_float64(of_rows, temperature, reduction, dtype, teacher_is, direction, shape):
    student, teacher = pair(shape, dtype, teacher_is)
    if teacher_is == "probs":
        teacher = teacher.clamp_min(2.0**-20)  # float16 has none of them as 0, whose reverse divergence is infinite
    labels = labels_of(student) if "labels" in of_rows else None
    weight = weight_of(student) if "weight" in of_rows else None
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, lse = L.kl_divergence(
        leaf, teacher, temperature=temperature, direction=direction, beta=0.3, teacher_is=teacher_is, labels=labels,
        weight=weight, reduction=reduction, return_lse=True,
    )  # fmt: skip
    alone = L.kl_divergence(
        leaf, teacher, temperature=temperature, direction=direction, beta=0.3, teacher_is=teacher_is, labels=labels,
        weight=weight, reduction=reduction,
    )  # fmt: skip
    torch.testing.assert_close(alone, loss, rtol=0, atol=0)
    losses = rows(exact, teacher, direction, teacher_is, temperature, 0.3)
    expected = reduced(losses, shape[-1], reduction, None if labels is None else labels != -100, weight)
    exact_lse = (exact / temperature).logsumexp(-1)
    assert loss.dtype == lse.dtype == dtype
    # A value is a difference of logarithms of some 8, each with its roundings.
    divisor = {"none": 1, "sum": 1, "batchmean": 1, "mean": shape[-1]}[reduction]
    steps = {torch.float32: 4e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}[dtype]
    count = losses.numel() if reduction == "sum" else 1
    tolerance = {
        "rtol": 1.02 * torch.finfo(dtype).eps / 2 if dtype in HALVES else 4 * steps,
        "atol": steps * count / divisor,
    }
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance["rtol"], atol=tolerance["atol"] + tiny)
    assert_close(lse.detach(), exact_lse.detach(), 16)
    # Both results, either, and the loss whose gradient forward has made.
    for chosen, of_exact in (((loss, lse), (expected, exact_lse)), ((lse,), (exact_lse,)), ((alone,), (expected,))):
        us = upstreams(*chosen)
        (grad,) = torch.autograd.grad(chosen, leaf, us, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(of_exact, exact, [u.double() for u in us], retain_graph=True)
        assert grad.dtype == dtype
        largest = exact_grad.abs().max().item()
        rtol = 1.02 * torch.finfo(dtype).eps / 2 if dtype in HALVES else 0
        torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=4 * steps * largest + tiny)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_teacher_of_another_dtype(dtypes, direction):
    student, teacher = pair((7, 60), torch.bfloat16)
    student, teacher = student.to(dtypes[0]).requires_grad_(), teacher.to(dtypes[1])
    loss = L.kl_divergence(student, teacher, direction=direction, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), rows(student.detach(), teacher, direction), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.dtype == dtypes[0]


@needs_extension
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_runs_fused_and_nothing_else_runs(dtype, direction):
    student, teacher = pair((7, 60), dtype)
    for each in (student, student.clone().requires_grad_()):
        with Recorder() as recorder:
            L.kl_divergence(each, teacher, direction=direction)
        beside = {"aten.detach.default", "aten.promote_types.default"}  # no work
        assert [each for each in recorder.seen if each not in beside] == ["fusedloss.kl_divergence.default"]
    assert fusedloss.explain(L.kl_divergence, student, teacher, direction=direction).startswith("fused: ")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_of_any_strides(direction):
    student, teacher = pair((12, 40))
    expected = L.kl_divergence(student, teacher, direction=direction, reduction="none")
    for turn in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :40], lambda t: t.expand(12, 40)):
        leaf = turn(student).detach().requires_grad_()
        loss = L.kl_divergence(leaf, turn(teacher), direction=direction, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        plain = student.clone().requires_grad_()
        (same,) = torch.autograd.grad(
            L.kl_divergence(plain, teacher, direction=direction, reduction="none").sum(), plain
        )
        torch.testing.assert_close(grad, same, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("teacher_is", TEACHERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_and_gradgradcheck(reduction, teacher_is, direction):
    student, teacher = pair((4, 3), torch.float64, teacher_is)
    student.requires_grad_()
    labels = torch.tensor([0, -100, 1, 2], device=student.device)
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0], device=student.device, dtype=torch.float64)

    def call(student: Tensor, teacher: Tensor = teacher) -> tuple[Tensor, Tensor]:
        return L.kl_divergence(
            student, teacher, temperature=1.7, direction=direction, beta=0.3, teacher_is=teacher_is, labels=labels,
            weight=weight, reduction=reduction, return_lse=True,
        )  # fmt: skip

    for each in (call, lambda student: call(student)[0]):
        assert gradcheck(each, student)
        assert gradgradcheck(each, student)
    assert gradcheck(lambda teacher: call(student.detach(), teacher)[0], teacher.clone().requires_grad_())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_parameters_that_are_tensors_get_their_gradients(direction):
    student, teacher = pair((4, 3), torch.float64)
    numbers = [torch.tensor(number, dtype=torch.float64, device=student.device) for number in (1.7, 0.3)]
    call = lambda t, b: L.kl_divergence(student, teacher, temperature=t, direction=direction, beta=b)  # noqa: E731
    numbers = [each.requires_grad_(direction == "jsd" or i == 0) for i, each in enumerate(numbers)]
    assert gradcheck(call, numbers)


@needs_extension
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_teacher_that_requires_a_gradient_gets_the_formulas(direction):
    student, teacher = pair((5, 8))
    teacher.requires_grad_()
    assert fusedloss.explain(L.kl_divergence, student, teacher) == "native: the teacher requires a gradient"
    exact = teacher.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(L.kl_divergence(student, teacher, direction=direction), teacher)
    (expected,) = torch.autograd.grad(rows(student, exact, direction).mean(), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


# ---- the edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("columns", [6, 3000])
def test_masked_classes(columns, direction, dtype):
    student, teacher = pair((4, columns), dtype)
    student[:, 1] = teacher[:, 1] = -math.inf  # of neither
    student[0, 2] = -math.inf
    teacher[1, 3] = -math.inf
    student.requires_grad_()
    losses = L.kl_divergence(student, teacher, direction=direction, reduction="none")
    infinite = {"forward": [True, False], "reverse": [False, True], "jsd": [False, False]}[direction]
    assert losses[:2].isinf().tolist() == infinite and losses[2:].isfinite().all()
    expected = rows(student.detach(), teacher, direction)
    finite = ~losses.isinf()
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(losses.double()[finite], expected[finite], rtol=rtol, atol=1e-6)
    # An infinite reverse divergence has no gradient; all others have one, 0 where neither side has mass.
    counted = finite if direction == "reverse" else torch.ones_like(finite)
    (grad,) = torch.autograd.grad(losses, student, torch.ones_like(losses))
    assert grad[counted].isfinite().all() and (grad[counted][:, 1] == 0).all()


def test_a_class_whose_mass_rounds_to_nothing_weighs_nothing():
    # In the first block the teacher's mass is all there is, beside a student's mask; the second block makes it nothing.
    student, teacher = torch.zeros(1, 2048), torch.full((1, 2048), -500.0)
    student[0, :1024] = -math.inf
    teacher[0, 1024:] = 0.0
    assert L.kl_divergence(student, teacher).item() == pytest.approx(0, abs=1e-6)
    # And where it stays, the divergence is infinite.
    assert L.kl_divergence(student, teacher + 500 * (teacher < 0)).item() == math.inf


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_rows_diverge_by_nothing(direction):
    student, _ = pair((5, 3000))
    loss = L.kl_divergence(student + 100, student, direction=direction, reduction="none")
    torch.testing.assert_close(loss, torch.zeros(5), rtol=0, atol=2e-5)
    same = L.kl_divergence(student, student, direction=direction, reduction="none")
    torch.testing.assert_close(same, torch.zeros(5), rtol=0, atol=1e-7)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_hold_anything_and_get_no_gradient(reduction, direction):
    student, teacher = pair((6, 40))
    labels = torch.tensor([0, 7, 1, 7, 2, 3], device=student.device)
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 0.5], device=student.device)
    out = torch.tensor([1, 2, 3], device=student.device)
    kept = torch.tensor([0, 4, 5], device=student.device)
    student[out], teacher[out] = math.nan, math.inf
    student.requires_grad_()
    given = {"direction": direction, "reduction": reduction}
    loss = L.kl_divergence(student, teacher, labels=labels, ignore_index=7, weight=weight, **given)
    alone = student.detach()[kept].requires_grad_()
    expected = L.kl_divergence(alone, teacher[kept], weight=weight[kept], **given)
    torch.testing.assert_close(loss[kept] if reduction == "none" else loss, expected)
    assert reduction != "none" or (loss[out] == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), student)
    (expected_grad,) = torch.autograd.grad(expected.sum(), alone)
    torch.testing.assert_close(grad[kept], expected_grad)
    assert (grad[out] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("by", ["labels", "weight"])
def test_a_mean_of_no_rows_is_no_number_and_has_no_gradient(by, direction):
    student, teacher = pair((3, 5))
    student.requires_grad_()
    given = {"labels": torch.full((3,), -100)} if by == "labels" else {"weight": torch.zeros(3)}
    for reduction in ("batchmean", "mean"):
        loss = L.kl_divergence(student, teacher, direction=direction, reduction=reduction, **given)
        assert loss.isnan()
        assert (torch.autograd.grad(loss, student)[0] == 0).all()
    assert L.kl_divergence(student, teacher, direction=direction, reduction="sum", **given) == 0


def test_no_rows_at_all():
    student, teacher = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5)
    assert L.kl_divergence(student, teacher).isnan()
    assert L.kl_divergence(student, teacher, reduction="sum") == 0
    assert L.kl_divergence(student, teacher, reduction="none").shape == (0,)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_at_both_ends_of_beta_nothing_diverges(beta):
    student, teacher = pair((4, 30))
    student[0, 3] = teacher[1, 4] = -math.inf
    student.requires_grad_()
    loss = L.kl_divergence(student, teacher, direction="jsd", beta=beta, reduction="none")
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_beside_torchs_kl_div():
    student, teacher = pair((6, 50))
    expected = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(L.kl_divergence(student, teacher, temperature=2), expected)
    expected = F.kl_div(student.log_softmax(1), 2 * teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(L.kl_divergence(student, 2 * teacher.softmax(1), teacher_is="probs"), expected)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive, got nan"),
        ({"temperature": "1"}, TypeError, "'temperature' must be float, not str"),
        ({"beta": 1.5}, ValueError, "beta must be from 0 to 1, got 1.5"),
        ({"beta": -0.1}, ValueError, "beta must be from 0 to 1, got -0.1"),
        ({"direction": "backward"}, ValueError, "direction must be one of .*, got 'backward'"),
        ({"teacher_is": "odds"}, ValueError, "teacher_is must be one of .*, got 'odds'"),
        ({"reduction": "median"}, ValueError, "reduction must be one of .*, got 'median'"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels .* \(3,\), got shape \(4,\)"),
        ({"labels": torch.zeros(3)}, ValueError, "labels must be integers, got torch.float32"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight .* \(3,\), got shape \(3, 5\)"),
        ({"weight": torch.zeros(3, dtype=torch.int64)}, ValueError, "weight .*floating point dtype, got torch.int64"),
        ({"teacher": torch.zeros(3, 4)}, ValueError, r"student_logits \(3, 5\) and teacher \(3, 4\)"),
        ({"teacher": torch.ones(3, 5, dtype=torch.int64)}, ValueError, "teacher .*point dtype, got torch.int64"),
    ],
)  # fmt: skip
def test_what_is_refused(given, error, words):
    student, teacher = pair((3, 5))
    with pytest.raises(error, match=words):
        L.kl_divergence(student, given.pop("teacher", teacher), **given)


# ---- around a call


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_under_autocast_results_are_float32(direction):
    student, teacher = pair((6, 50), torch.bfloat16)
    with autocast(torch.bfloat16):
        loss = L.kl_divergence(student, teacher, direction=direction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), rows(student, teacher, direction).mean(), rtol=1e-5, atol=1e-6)


@needs_extension
@on_cpu_alone("a GPU makes the gradient in backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_allocates_the_gradient_and_little_more(dtype):
    student, teacher = pair((64, 4000), dtype)
    student.requires_grad_()

    def step() -> None:
        torch.autograd.grad(L.kl_divergence(student, teacher, temperature=2.0), student)

    step()
    assert bytes_allocated(step) <= 1.05 * student.nbytes


@needs_extension
@on_cpu_alone("no gradient is made in forward on a GPU")
def test_backward_scales_the_gradient_of_forward():
    student, teacher = pair((8, 40))
    student.requires_grad_()
    with Recorder() as recorder:
        loss = 4 * L.kl_divergence(student, teacher)
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert "fusedloss.kl_divergence_backward.default" not in recorder.seen
    (again,) = torch.autograd.grad(loss, student)
    assert torch.equal(grad, again)


@needs_extension
def test_a_bfloat16_gradient_is_rounded_once():
    student, teacher = pair((8, 400), torch.bfloat16)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(L.kl_divergence(student, teacher, reduction="sum"), student, torch.tensor(1.25))
    (expected,) = torch.autograd.grad(1.25 * rows(exact, teacher, "forward").sum(), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1.02 * 2.0**-8, atol=1e-7)


@needs_extension
def test_changed_rows_are_noticed():
    student, teacher = pair((4, 5))
    student.requires_grad_()
    loss = L.kl_divergence(student, teacher, reduction="none").sum()
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_threads_do_not_change_a_bit(direction, threads):
    student, teacher = pair((300, 700))
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        leaf = student.clone().requires_grad_()
        loss = L.kl_divergence(leaf, teacher, direction=direction)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
