"""Divergences of a student from a teacher over a sharded vocabulary."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _route as _routes
from .._traced import Described
from ..distillation._formula import DIRECTIONS, REDUCTIONS, TEACHERS, Call, reduced, rows_kept
from ..losses._dtensors import refuse_dtensor
from ..losses.distillation import check_names, check_of_rows, checked_numbers
from . import _shards
from ._call import may_look, place_of
from ._numbers import fixed
from ._pair import NUMBERS
from ._pair_rows import Given, declines, of_rows
from ._shards import HEAD, Shard, shard_of

_FUNCTION = "kl_divergence"


def kl_divergence(
    student_logits: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    teacher_is: str = "logits",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    r""":func:`fusedloss.functional.kl_divergence` of logits whose classes are spread over the ranks of a group.

    Every rank passes both sides' numbers of its own classes, and all else alike, and gets the whole divergence, the
    same bits on every rank. Backward gives the gradient of its own student's logits, for an upstream gradient that is
    the same on every rank, and does not communicate. Forward is an all_gather of 5 numbers a row; for ``"jsd"`` another
    one follows, of 2 numbers a row.

    Args:
        student_logits: this rank's logits (..., C_local), the classes last. A rank may hold no class at all.
        teacher: the teacher's numbers of the same classes.
        temperature, beta: numbers.
        group, vocab_start, vocab_size: as for :func:`fusedloss.parallel.cross_entropy`.

    The other arguments are those of :func:`fusedloss.functional.kl_divergence`, of whose teachers those of k classes
    are not taken. A teacher that requires a gradient gets it natively.

    Raises:
        ValueError: on every rank, where the ranks' classes leave a gap, overlap or do not add up to ``vocab_size``, a
            rank's student and teacher have different classes, or the ranks' arguments, dtypes, or rows that count
            differ; on a GPU as for :func:`fusedloss.parallel.cross_entropy`.
        RuntimeError: one of the tensors is a DTensor.
        TypeError, ValueError: as the whole divergence.
    """
    check_names(direction=direction, teacher_is=teacher_is, reduction=reduction)
    temperature, beta = fixed(_FUNCTION, "temperature", temperature), fixed(_FUNCTION, "beta", beta)
    temperature, beta = checked_numbers(_FUNCTION, temperature, beta)
    _check(student_logits, teacher, labels, weight)
    *rows, classes = student_logits.shape
    shard = shard_of(_FUNCTION, classes, group, vocab_start, vocab_size)
    fits = teacher.shape[-1] == classes
    whole = Call(
        student_logits.reshape(math.prod(rows), classes),
        teacher, None if labels is None else labels.reshape(-1), None if weight is None else weight.reshape(-1),
        direction, teacher_is, reduction, ignore_index, temperature, beta,
    )  # fmt: skip
    # What is cut otherwise is told after the others have heard of it.
    numbers = teacher.reshape(whole.student.shape) if fits else torch.zeros_like(whole.student, dtype=teacher.dtype)
    call = whole._replace(teacher=numbers)
    looks = may_look(student_logits, shard)
    given = Given(_seen(call, fits), shard, _FUNCTION, looks, call[4:])
    if not is_compiling() and _routes.asked():
        _tell(call, shard)
    heads, values = of_rows(call, given)
    if not fits:
        raise ValueError(
            f"{_FUNCTION}: expected a teacher of the {classes} classes of this rank's student, got shape "
            f"{tuple(teacher.shape)}"
        )
    if not looks:
        values = values + torch.where(_shards.agree(heads), 0.0, torch.nan).to(values.dtype)
    logits: Any = Described(
        "Tensor", call.student.dtype, call.student.device, torch.strided, torch.Size([len(values), shard.total]), False
    )
    loss = reduced(values, rows_kept(call), call._replace(student=logits)).to(call.result)
    return loss.reshape(rows) if reduction == "none" else loss


def _check(student: Any, teacher: Any, labels: Tensor | None, weight: Tensor | None) -> None:
    """What every rank sees alike."""
    for name, tensor in (("student_logits", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{_FUNCTION}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
        refuse_dtensor(_FUNCTION, name, tensor, "its shard", "to_local")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating point dtype, got {tensor.dtype}")
        if tensor.dim() < 1:
            raise ValueError(f"{name} must have a dimension of classes, got shape {tuple(tensor.shape)}")
    for name, each in (("labels", labels), ("weight", weight)):
        refuse_dtensor(_FUNCTION, name, each, "whole", "full_tensor")
    rows = tuple(student.shape[:-1])
    if tuple(teacher.shape[:-1]) != rows:
        raise ValueError(
            f"student and teacher must be of the same rows, got student_logits {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}"
        )
    check_of_rows(rows, labels, weight)


def _seen(call: Call, fits: bool) -> Tensor:
    """What must be the same on every rank: which rows count, and what the numbers and the collectives depend on."""
    parts = [int(each * 2**20) for each in (call.temperature, call.beta)]
    names = (DIRECTIONS.index(call.direction), TEACHERS.index(call.teacher_is), REDUCTIONS.index(call.reduction))
    differentiates = torch.is_grad_enabled() and call.teacher.requires_grad
    plan = [*parts, *names, _DTYPES.index(call.teacher.dtype), differentiates, not fits]
    kept = rows_kept(call)
    numbers = torch.tensor([int(each) for each in plan], device=call.student.device)
    return numbers if kept is None else torch.cat([numbers, kept.long()])


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _tell(call: Call, shard: Shard) -> None:
    why = declines(call)
    if why is not None:
        _routes.tell_native(why)
    rows, size = call.student.shape[0], call.computed.itemsize
    rounds = f"an all_gather of {(NUMBERS * rows + HEAD) * size} bytes"
    if call.direction == "jsd":
        rounds += f" and one of {2 * rows * 8}"
    _routes.tell(f"fused: {place_of(shard, call.student.device.type)}, {rounds} from each of {shard.ranks} ranks")
