"""Calls of the divergences of rows, and their formulas in float64, which share nothing with the package's own."""

import torch
from torch import Tensor

DIRECTIONS = ("forward", "reverse", "jsd")
TEACHERS = ("logits", "log_probs", "probs")
REDUCTIONS = ("none", "sum", "batchmean", "mean")


def pair(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, teacher_is: str = "logits", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher, in the dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    student, teacher = (3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for _ in "st")
    if teacher_is != "logits":
        teacher = teacher.log_softmax(-1) if teacher_is == "log_probs" else teacher.softmax(-1)
    return student.to(device, dtype), teacher.to(device, dtype)


def xlogy(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_ratio))


def rows(
    student: Tensor, teacher: Tensor, direction: str, teacher_is: str = "logits", temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:  # fmt: skip
    """The divergence of each row."""
    log_q = (student.double() / temperature).log_softmax(-1)
    t = teacher.double()
    log_p = {"logits": (t / temperature).log_softmax(-1), "log_probs": t, "probs": t.clamp_min(0).log()}[teacher_is]
    q, p = log_q.exp(), log_p.exp()
    if direction == "forward":
        return xlogy(p, log_p - log_q).sum(-1)
    if direction == "reverse":
        return xlogy(q, log_q - log_p).sum(-1)
    m = beta * p + (1 - beta) * q
    log_m = torch.where(m == 0, 1.0, m).log()
    return (beta * xlogy(p, log_p - log_m) + (1 - beta) * xlogy(q, log_q - log_m)).sum(-1)


def reduced(
    losses: Tensor, classes: int, reduction: str, kept: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    kept = torch.ones_like(losses, dtype=torch.bool) if kept is None else kept
    weight = (torch.ones_like(losses) if weight is None else weight.double()).masked_fill(~kept, 0.0)
    losses = torch.where(weight == 0, 0.0, losses * weight)
    if reduction == "none":
        return losses
    divisor = {"sum": 1.0, "batchmean": weight.sum(), "mean": weight.sum() * classes}[reduction]
    return losses.sum() / divisor
