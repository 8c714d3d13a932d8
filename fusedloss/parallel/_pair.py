"""The divergence of a row from what its parts on the ranks are known by.

With Q_l and P_l the logsumexps of the student's and the teacher's part l, and Q and P those of the row, the part has
the shares k_l = exp(Q_l - Q) and p_l = exp(P_l - P) of their probabilities, and

    KL(teacher || student) = sum_l p_l (KL_l(teacher || student) + log p_l - log k_l)
    KL(student || teacher) = sum_l k_l (KL_l(student || teacher) + log k_l - log p_l)

where KL_l is that of the part alone. Probabilities that are given are not divided by their sum: there p_l is 1, and the
part's mass stands where its probabilities add up to 1. The Jensen-Shannon divergence mixes q and p class by class, so
that both sums have to be known first: its terms are made, and gathered, in a second round.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..distillation._formula import Call, from_mixture, of_log_probs, rows_kept
from ._row import lowest

NUMBERS = 5  # of a row, that a rank sends
# Classes of the mixture's terms that are made at once, 8 bytes a few times.
_BLOCK = 2**16


class Row(NamedTuple):
    value: Tensor
    max_q: Tensor
    log_sum_q: Tensor
    max_p: Tensor
    log_sum_p: Tensor
    constant: Tensor  # as in csrc/losses/distillation.h

    def statistics(self, dtype: torch.dtype) -> Tensor:
        """As the kernels take them."""
        return torch.stack(self[1:]).to(dtype)


class Logs(NamedTuple):
    """Student and teacher as what the softmax is taken of, or the teacher as log-probabilities."""

    z: Tensor
    w: Tensor

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype) -> "Logs":
        """An ignored row's numbers are zeros. A rank without classes has one that is masked."""
        student, teacher = call.student.to(dtype), call.teacher.to(dtype)
        if (kept := rows_kept(call)) is not None:
            student, teacher = (torch.where(kept.unsqueeze(-1), each, 0.0) for each in (student, teacher))
        if call.student.shape[-1] == 0:
            masked = student.new_full((*student.shape[:-1], 1), -torch.inf)
            student = torch.cat([student, masked], -1)
            teacher = torch.cat([teacher, torch.zeros_like(masked) if call.teacher_is == "probs" else masked], -1)
        w = {"logits": lambda: teacher / call.temperature, "log_probs": lambda: teacher, "probs": teacher.log}
        return cls(student / call.temperature, w[call.teacher_is]())


def _max_and_log_sum(z: Tensor) -> tuple[Tensor, Tensor]:
    max = z.detach().amax(-1).clamp_min(lowest(z))
    total = (z - max.unsqueeze(-1)).exp().sum(-1)
    nothing = total == 0
    return max, torch.where(nothing, -torch.inf, torch.where(nothing, 1.0, total).log())


def natively(call: Call, dtype: torch.dtype) -> Tensor:
    """What a rank knows of its part, in PyTorch's operators: (NUMBERS, rows)."""
    z, w = Logs.of(call, dtype)
    max_q, log_q = _max_and_log_sum(z)
    part_q = z - max_q.unsqueeze(-1) - _finite(log_q).unsqueeze(-1)
    if call.teacher_is == "logits":
        first, second = _max_and_log_sum(w)
        part_p = w - first.unsqueeze(-1) - _finite(second).unsqueeze(-1)
    else:
        part_p, first = w, w.exp().sum(-1)
        second = torch.zeros_like(first)
    mixes = call.direction == "jsd"
    value = torch.zeros_like(max_q) if mixes else of_log_probs(part_q, part_p, call.direction, call.beta)
    return torch.stack([max_q, log_q, first, second, value])


def _finite(log_sum: Tensor) -> Tensor:
    return torch.where(log_sum == -torch.inf, 0.0, log_sum)


def by_kernels(call: Call, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same by one read of both. ``counted``: 1 for each row that counts, and 0."""
    direction = "forward" if call.direction == "jsd" else call.direction
    value, _, statistics, _ = torch.ops.fusedloss.kl_divergence(
        call.student, call.teacher, None, counted, direction, call.teacher_is, "none", 0, float(call.temperature),
        float(call.beta), True, False, False,
    )  # fmt: skip
    max_q, log_q, max_p, log_p, constant = statistics.view(NUMBERS, -1).unbind()
    if call.teacher_is != "logits":
        max_p, log_p = constant if direction == "forward" else torch.zeros_like(constant), torch.zeros_like(constant)
    return torch.stack([max_q, log_q, max_p, log_p, value.to(dtype)])


def _shares(max: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The row's max and log of its sum, and the logarithm of each part's share. All of (ranks, rows)."""
    top = max.detach().amax(0)
    seen = log_sum + (max.detach() - top)
    largest = seen.detach().amax(0).clamp_min(lowest(seen))
    total = (seen - largest).exp().sum(0)
    log_total = largest + total.log()
    return top, log_total, seen - log_total


def combined(blocks: Tensor, call: Call) -> Row:
    """The row of all parts (ranks, NUMBERS, rows), in float64; of a mixture only what its terms need."""
    max_q, log_q, first, second, value = blocks.double().unbind(1)
    zeros, mass = torch.zeros_like(value[0]), torch.ones_like(value)
    top_q, sum_q, share_q = _shares(max_q, log_q)
    top_p, sum_p, share_p = zeros, zeros, torch.zeros_like(value)
    if call.teacher_is == "logits":
        top_p, sum_p, share_p = _shares(first, second)
    elif call.direction == "forward":
        mass = first
    if call.direction == "jsd":
        return Row(zeros, top_q, sum_q, top_p, sum_p, zeros)
    own, other = (share_p, share_q) if call.direction == "forward" else (share_q, share_p)
    nothing = (own.to(blocks.dtype).exp() == 0) | (mass == 0)  # what rounds to 0 in the arithmetic is no mass
    missing = ~nothing & (other == -torch.inf)
    left_out = nothing | missing
    own, other, value = (torch.where(left_out, 0.0, each) for each in (own, other, value))
    parts = torch.where(left_out, 0.0, own.exp() * (value + mass * (own - other)))
    total = torch.where(missing.any(0), torch.inf, parts.sum(0))
    if call.direction == "reverse":
        return Row(total, top_q, sum_q, top_p, sum_p, total)
    return Row(total, top_q, sum_q, top_p, sum_p, zeros + 1 if call.teacher_is == "logits" else mass.sum(0))


def row_logs(call: Call, row: Row, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log q and log p of this rank's classes in the whole row."""
    z, w = Logs.of(call, dtype)
    max_q, log_q, max_p, log_p = (each.to(dtype).unsqueeze(-1) for each in row[1:5])
    return z - max_q - log_q, w - max_p - log_p


def mixed(call: Call, row: Row) -> Tensor:
    """What this rank's classes add to a Jensen-Shannon divergence, and to its constant: (2, rows), in float64."""
    log_q, log_p = row_logs(call, row, torch.float64)
    of_student, of_teacher = from_mixture(log_q, log_p, call.beta)
    return torch.stack([call.beta * of_teacher + (1 - call.beta) * of_student, of_student])


def mixed_in_blocks(call: Call, row: Row) -> Tensor:
    """Some rows at a time. A graph would have each block's operators: a compiler gets all rows, and makes its loops."""
    if is_compiling():
        return mixed(call, row)
    rows, classes = call.student.shape
    step = max(1, _BLOCK // max(1, classes))
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        of_part = call._replace(
            student=call.student[part],
            teacher=call.teacher[part],
            labels=None if call.labels is None else call.labels[part],
            weight=None if call.weight is None else call.weight[part],
        )
        parts.append(mixed(of_part, Row(*(each[part] for each in row))))
    return torch.cat(parts, 1) if parts else row.value.new_zeros(2, 0)


def gradient(call: Call, row: Row, dtype: torch.dtype) -> Tensor:
    """Of the value by this rank's logits, as csrc/losses/distillation.h has it, where a rank runs natively."""
    log_q, log_p = row_logs(call, row, dtype)
    q, p, constant = log_q.exp(), log_p.exp(), row.constant.to(dtype).unsqueeze(-1)
    if call.direction == "forward":
        made = constant * q - p
    else:
        log_m, factor = log_p, 1.0
        if call.direction == "jsd":
            factor = 1 - float(call.beta)
            log_m = (float(call.beta) * p + factor * q).log()
        made = torch.where(q == 0, 0.0, factor * q * (log_q - log_m - constant))
    return made[..., : call.student.shape[-1]] / call.temperature
