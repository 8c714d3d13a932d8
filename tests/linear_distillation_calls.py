"""Operands of the linear divergence, its formula in float64, and the ways in which its backward runs."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from compare import upstreams
from distillation_calls import reduced, rows
from linear_calls import drawn
from torch import Tensor

import fusedloss.functional as L

CLASSES, FEATURES = 11, 6
NAMES = ("input", "linear_weight", "linear_bias")
TEACHERS = ("teacher", "teacher_weight", "teacher_bias")
# Forward makes the gradients, or keeps what backward needs for a sum, for each row.
ROUTES: dict[str, dict[str, Any]] = {
    "in forward": {},
    "in backward": {"grad_in_forward": False},
    "each row": {"reduction": "none"},
}


def operands(
    shape: Iterable[int] = (23,), dtype: torch.dtype = torch.float32, classes: int = CLASSES, features: int = FEATURES
) -> dict[str, Tensor]:
    """Both sides: the student's require gradients. The teacher's hidden states are narrower."""
    shape = tuple(shape)
    sizes = [(*shape, features), (classes, features), (classes,), (*shape, features - 2), (classes, features - 2)]
    made = [drawn(*size, seed=seed).to(dtype) for seed, size in enumerate([*sizes, (classes,)])]
    return dict(zip((*NAMES, *TEACHERS), [*[each.requires_grad_() for each in made[:3]], *made[3:]], strict=True))


def with_numbers(given: dict[str, Tensor], teacher_is: str = "logits") -> dict[str, Tensor]:
    """The same with what the teacher's head makes, in place of its hidden states."""
    logits = F.linear(*(given[name].double() for name in TEACHERS))
    numbers = {"logits": logits, "log_probs": logits.log_softmax(-1), "probs": logits.softmax(-1)}[teacher_is]
    return {**{name: given[name] for name in NAMES}, "teacher": numbers.to(given["teacher"].dtype)}


def labels_of(shape: Iterable[int] = (23,)) -> Tensor:
    """A fifth of the rows is ignored."""
    labels = torch.zeros(tuple(shape), dtype=torch.int64)
    if labels.numel() > 1:
        labels.view(-1)[1::5] = -100
    return labels


def weight_of(shape: Iterable[int] = (23,), dtype: torch.dtype = torch.float32) -> Tensor:
    weight = drawn(*shape, seed=9).abs() + 0.25
    if weight.numel() > 3:
        weight.view(-1)[3] = 0
    return weight.to(dtype)


def leaves(given: dict[str, Tensor]) -> list[Tensor]:
    return [each for each in given.values() if each.requires_grad]


def call(given: dict[str, Tensor], chunk_rows: int | None = 5, **options: Any) -> Tensor:
    return L.linear_kl_divergence(**given, chunk_rows=chunk_rows, **options)  # type: ignore[arg-type]


def exact(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients, by the formula of the logits."""
    wide = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in given.items()}
    loss = formula(wide, **options)
    return loss.detach(), grads(loss, leaves(wide))


def formula(
    wide: dict[str, Tensor], direction: str = "forward", teacher_is: str = "logits", temperature: float = 1.0,
    beta: float = 0.5, labels: Tensor | None = None, weight: Tensor | None = None, reduction: str = "batchmean",
    grad_in_forward: bool | None = None,
) -> Tensor:  # fmt: skip
    teacher = wide["teacher"]
    if "teacher_weight" in wide:
        teacher = F.linear(teacher, wide["teacher_weight"], wide.get("teacher_bias"))
    student = F.linear(wide["input"], wide["linear_weight"], wide.get("linear_bias"))
    losses = rows(student, teacher, direction, teacher_is, temperature, beta)
    return reduced(losses, student.shape[-1], reduction, None if labels is None else labels != -100, weight)


def grads(loss: Tensor, of: list[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of, [each.to(loss.dtype) for each in upstreams(loss)], **options))
