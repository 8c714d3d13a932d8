"""A teacher of which only the k most probable classes of each row are known, in plain PyTorch."""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _route
from ._formula import Call, of_log_probs, reduced, rows_kept

RESTS = ("bucket", "renormalise")
WHY_NATIVE = "a teacher of top-k classes, whose k numbers a row are left to PyTorch"


def divergence(call: Call, indices: Tensor, rest: str, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The loss and, on request, the lse of the student's rows, ignored ones too.

    The teacher holds log-probabilities (..., k) of the indices.
    """
    classes = call.student.shape[-1]
    if not is_compiling() and indices.device.type == "cpu":
        outside = (indices < 0) | (indices >= classes)
        if outside.any():
            raise IndexError(f"index {indices[outside][0].item()} is out of bounds for {classes} classes")
    kept = rows_kept(call)
    # One copy in float32 of a half-precision student: the two parts of its gradient cancel, and are rounded once.
    student, log_p = call.student.to(call.computed), call.teacher.to(call.computed)
    if kept is not None:
        student, log_p = (torch.where(kept.unsqueeze(-1), each, 0.0) for each in (student, log_p))
    z = student.gather(-1, indices.long()) / call.temperature
    if rest == "renormalise":
        log_q, log_p = z.log_softmax(-1), log_p.log_softmax(-1)
    else:
        log_q = z - _lse(call, student).unsqueeze(-1)
        log_q, log_p = (torch.cat([each, _rest(each)], -1) for each in (log_q, log_p))
    losses = of_log_probs(log_q, log_p, call.direction, call.beta)
    lse = _lse(call, call.student.to(call.computed)).to(call.result) if return_lse else None
    return reduced(losses, kept, call).to(call.result), lse


def _rest(logs: Tensor) -> Tensor:
    """The logarithm of what the probabilities leave to all other classes: -infinity where they leave nothing."""
    total = logs.logsumexp(-1, keepdim=True)
    whole = total >= 0
    return torch.where(whole, -torch.inf, (-torch.expm1(torch.where(whole, -1.0, total))).log())


def _lse(call: Call, student: Tensor) -> Tensor:
    """By the kernels of cross-entropy, whose second result it is, so that no exponential of a row is in memory."""
    rows = student.reshape(-1, student.shape[-1])
    rows = rows if call.temperature == 1 else rows / call.temperature
    first = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    _, lse = _route.LOSSES["cross_entropy"].routed(rows, first, None, "none", -100, 0.0, 0.0, 0.0, second=True)
    of_rows: Tensor = lse.reshape(student.shape[:-1])
    return of_rows
