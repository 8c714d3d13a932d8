"""The divergence in plain PyTorch: the fallback, and what every derivative that the kernels do not have comes from."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import widened

DIRECTIONS = ("forward", "reverse", "jsd")
TEACHERS = ("logits", "log_probs", "probs")
REDUCTIONS = ("none", "sum", "batchmean", "mean")


class Call(NamedTuple):
    """A divergence of rows (..., C); labels and weight have the shape of the rows."""

    student: Tensor  # logits
    teacher: Tensor
    labels: Tensor | None
    weight: Tensor | None
    direction: str
    teacher_is: str
    reduction: str
    ignore_index: int
    temperature: float
    beta: float

    @property
    def computed(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.promote_types(torch.promote_types(self.student.dtype, self.teacher.dtype), torch.float32)

    @property
    def wide(self) -> bool:
        """Whether results are of the arithmetic's dtype, not of the student's."""
        promoted = torch.promote_types(self.student.dtype, self.teacher.dtype)
        return widened(self.student) or promoted != self.student.dtype

    @property
    def result(self) -> torch.dtype:
        return self.computed if self.wide else self.student.dtype


def formula(call: Call, wide: bool | None = None) -> tuple[Tensor, Tensor]:
    """The loss, and the lse of the student's rows; ``wide`` as it was where the call was made."""
    result = call.result if wide is None else call.computed if wide else call.student.dtype
    z = call.student.to(call.computed) / call.temperature
    kept = rows_kept(call)
    lse = z.logsumexp(-1)
    w = call.teacher.to(call.computed)
    if kept is not None:  # what stands in an ignored row may be no number
        z, w = (torch.where(kept.unsqueeze(-1), each, 0.0) for each in (z, w))
    if call.teacher_is == "logits":
        log_p = (w / call.temperature).log_softmax(-1)
    else:
        log_p = w if call.teacher_is == "log_probs" else w.log()
    losses = of_log_probs(z.log_softmax(-1), log_p, call.direction, call.beta)
    return reduced(losses, kept, call).to(result), lse.to(result)


def of_log_probs(log_q: Tensor, log_p: Tensor, direction: str, beta: float) -> Tensor:
    """The divergence of each row, student q and teacher p."""
    q, p = log_q.exp(), log_p.exp()
    if direction == "forward":
        return _relative(p, log_p, log_q)
    if direction == "reverse":
        return _relative(q, log_q, log_p)
    of_student, of_teacher = from_mixture(log_q, log_p, beta)
    return beta * of_teacher + (1 - beta) * of_student


def from_mixture(log_q: Tensor, log_p: Tensor, beta: Any) -> tuple[Tensor, Tensor]:
    """The divergences of q and of p from m = beta p + (1 - beta) q, without the one that has no weight."""
    q, p = log_q.exp(), log_p.exp()
    if beta in (0, 1):  # m is q or p
        nothing = 0.0 * (q + p).sum(-1)
        return nothing, nothing
    neither = (p == 0) & (q == 0)  # logaddexp has no derivative there
    of_p, of_q = (torch.where(neither, 0.0, each) for each in (log_p, log_q))
    log_m = torch.logaddexp(of_p + _log(beta), of_q + _log(1 - beta))
    return _relative(q, log_q, log_m), _relative(p, log_p, log_m)


def _log(share: Any) -> Any:
    """Of a number, or of a tensor that may require a gradient."""
    return share.log() if isinstance(share, Tensor) else math.log(share)


def _relative(p: Tensor, log_p: Tensor, log_m: Tensor) -> Tensor:
    """The sum of p (log p - log m), where a class of p = 0 adds 0."""
    return (p * torch.where(p == 0, 0.0, log_p - log_m)).sum(-1)


def rows_kept(call: Call) -> Tensor | None:
    """Which rows count; None for all."""
    kept = None if call.labels is None else call.labels != call.ignore_index
    if call.weight is None:
        return kept
    weighty = call.weight != 0
    return weighty if kept is None else kept & weighty


def reduced(losses: Tensor, kept: Tensor | None, call: Call) -> Tensor:
    """A mean divides by the weights of the rows that count, times C where it is over elements."""
    weight = None if call.weight is None else call.weight.to(losses.dtype)
    losses = losses if weight is None else losses * weight
    if kept is not None:
        losses = torch.where(kept, losses, 0.0)
    if call.reduction == "none":
        return losses
    total = losses.sum()
    if call.reduction == "sum":
        return total
    if weight is not None:
        rows = (weight if kept is None else torch.where(kept, weight, 0.0)).sum()
    else:
        rows = torch.full_like(total, losses.numel()) if kept is None else kept.sum()
    return total / (rows if call.reduction == "batchmean" else rows * call.student.shape[-1])
