"""Divergences of random rows: never less accurate than torch's own operators."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from distillation_calls import DIRECTIONS, TEACHERS, reduced, rows
from hypothesis import given
from losses import DTYPES, HALVES
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss.functional as L

pytestmark = [needs_extension, on_cpu_alone("its slack is that of the CPU's sums: test_distillation.py bounds a GPU's")]

# What the error may exceed torch's by, in rounding steps of the arithmetic at the largest magnitude of what a value is
# a difference of: the roundings of two sums and their logarithms, and of the gap.
SLACK = 12.0
LARGEST = 6000


@dataclass(frozen=True)
class Recipe:
    """A call in a few numbers, which are what a failure prints."""

    seed: int
    dtype: torch.dtype
    shape: tuple[int, int]
    direction: str
    teacher_is: str
    temperature: float
    beta: float
    reduction: str
    log_scale: float
    log_distance: float
    offset: int
    masked: float
    ignored: float


def recipe(choices: Choices) -> Recipe:
    of = choices.of
    classes = choices.between(*of([(1, 12), (1, 150), (1, 3000), (1000, 3000)]))
    return Recipe(
        dtype=of(DTYPES),
        shape=(choices.between(1, max(1, min(LARGEST // classes, 40))), classes),
        direction=of(DIRECTIONS),
        teacher_is=of(TEACHERS),
        temperature=of([1.0, 2.0, 0.7, 5.0]),
        beta=of([0.5, 0.1, 0.9]),
        reduction=of(["none", "sum", "batchmean", "mean"]),
        log_scale=choices.between(-20, 15) / 10,
        log_distance=choices.between(-30, 10) / 10,
        offset=of([0, choices.between(-100, 100)]),
        masked=of([0.0, 0.0, 0.1, 0.5]),
        ignored=of([0.0, 0.0, 0.3, 1.0]),
        seed=choices.between(0, 2**32),
    )


def composed(student: Tensor, teacher: Tensor, recipe: Recipe) -> Tensor:
    """The divergence of each row as torch's users write it."""
    log_q = F.log_softmax(student / recipe.temperature, -1)
    log_p = {
        "logits": lambda: F.log_softmax(teacher / recipe.temperature, -1),
        "log_probs": lambda: teacher,
        "probs": lambda: teacher.log(),
    }[recipe.teacher_is]()
    if recipe.direction == "forward":
        return F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)
    if recipe.direction == "reverse":
        return F.kl_div(log_p, log_q.exp(), reduction="none").sum(-1)
    beta = torch.tensor(recipe.beta, dtype=torch.float64).to(log_q.dtype)
    log_m = torch.logaddexp(log_p + beta.log(), log_q + torch.log1p(-beta))
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


def error(got: Tensor, exact: Tensor) -> Tensor:
    """Its largest part."""
    return (got.double() - exact).abs().nan_to_num(torch.inf).max()


@pytest.mark.examples
@given(one_draw(recipe))
def test_no_less_accurate_than_torch(recipe):
    generator = torch.Generator().manual_seed(recipe.seed)
    made = [torch.randn(recipe.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    scale, dtype = 10**recipe.log_scale, recipe.dtype
    student = scale * made[0] + recipe.offset
    teacher = scale * (made[0] + 10**recipe.log_distance * made[1])
    mask = torch.rand(recipe.shape, generator=generator, dtype=torch.float64) < recipe.masked
    mask[:, 0] = False
    student, teacher = (each.masked_fill(mask, -torch.inf).to(dtype) for each in (student, teacher))
    if recipe.teacher_is != "logits":
        teacher = teacher.double().log_softmax(-1)
        teacher = (teacher if recipe.teacher_is == "log_probs" else teacher.exp()).to(dtype)
    ignored = torch.rand(recipe.shape[0], generator=generator, dtype=torch.float64) < recipe.ignored
    labels = torch.zeros(recipe.shape[0], dtype=torch.int64).masked_fill(ignored, -100)
    classes = recipe.shape[1]
    leaves = [student.clone().requires_grad_(), student.clone().requires_grad_(), student.double().requires_grad_()]
    ours = L.kl_divergence(
        leaves[0], teacher, temperature=recipe.temperature, direction=recipe.direction, beta=recipe.beta,
        teacher_is=recipe.teacher_is, labels=labels, reduction=recipe.reduction,
    )  # fmt: skip
    exact_rows = rows(leaves[2], teacher, recipe.direction, recipe.teacher_is, recipe.temperature, recipe.beta)
    if recipe.direction == "reverse" and exact_rows.isinf().any():
        return  # a probability that float16 rounds to 0
    exact = reduced(exact_rows, classes, recipe.reduction, ~ignored)
    torchs = reduced(composed(leaves[1], teacher, recipe).double(), classes, recipe.reduction, ~ignored).to(dtype)
    assert torch.equal(ours.isnan(), exact.isnan())
    if exact.isnan().any():
        return
    step = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    kept = max(1, int((~ignored).sum()))
    log_q = (leaves[2].detach() / recipe.temperature).log_softmax(-1)
    entropy = -log_q.exp().mul(log_q.clamp_min(-700)).sum(-1)
    # A logit over the temperature is rounded itself, in the formula too.
    divided = max(each.double().nan_to_num(0, 0, 0).abs().max().item() for each in (student, teacher))
    largest_row = 1 + exact_rows.detach().abs().max().item() + divided / recipe.temperature
    magnitude = largest_row + entropy.max().item()
    magnitude *= kept if recipe.reduction == "sum" else 1 / classes if recipe.reduction == "mean" else 1
    rounding = torch.finfo(dtype).eps / 2 * exact.detach().abs().max().item() + 2.0**-24 * (dtype == torch.float16)
    slack = SLACK * step * magnitude + 0.01 * rounding
    least = rounding if dtype in HALVES else 0.0
    assert error(ours.detach(), exact.detach()) <= max(error(torchs.detach(), exact.detach()).item(), least) + slack
    upstream = torch.rand(exact.shape, generator=generator, dtype=torch.float64) + 0.5
    upstream = upstream.to(dtype)
    grads = [
        torch.autograd.grad(value, leaf, upstream.to(value.dtype))[0]
        for value, leaf in zip((ours, torchs, exact), leaves, strict=True)
    ]
    largest = grads[2].abs().max().item()
    mass = upstream.double().max().item() / recipe.temperature
    mass /= kept if recipe.reduction in ("batchmean", "mean") else 1
    mass /= classes if recipe.reduction == "mean" else 1
    rounding = torch.finfo(dtype).eps / 2 * largest + 2.0**-24 * (dtype == torch.float16)
    slack = SLACK * step * mass * largest_row + 0.01 * rounding
    least = rounding if dtype in HALVES else 0.0
    assert error(grads[0], grads[2]) <= max(error(grads[1], grads[2]).item(), least) + slack
