"""When a divergence from hidden states takes the chunks: everything else runs through both sides' logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _captures, _route
from .._dtypes import HALVES, in_float
from .._library import extension, why_native
from .._traced import Described
from ..linear import Head, Options
from ..linear import _route as _linear
from ..linear._ops import Family, register
from . import _chunks
from ._chunks import Pair
from ._formula import Call
from ._route import declines, divergence

_REDUCTIONS = {"none": ("none", False), "sum": ("sum", False), "batchmean": ("mean", False), "mean": ("mean", True)}
_NAMES = {
    (_captures.REDUCTIONS[name], over_classes): reduction for reduction, (name, over_classes) in _REDUCTIONS.items()
}


class Hard(NamedTuple):
    """What is added to the divergence: the cross-entropy of labels that count."""

    of_teacher: Any  # what the divergence is multiplied by, not 0
    of_labels: Any  # and the cross-entropy


class Given(NamedTuple):
    """A call with its rows flattened; what follows the teacher is as in :class:`Call`."""

    student: Head
    teacher: Head | Tensor
    labels: Tensor | None
    weight: Tensor | None
    direction: str
    teacher_is: str
    reduction: str
    ignore_index: int
    temperature: Any
    beta: Any

    @property
    def heads(self) -> list[Head]:
        return [each for each in self[:2] if isinstance(each, Head)]

    def each_head(self, change: Callable[[Head], Head]) -> "Given":
        teacher = self.teacher
        return self._replace(
            student=change(self.student), teacher=change(teacher) if isinstance(teacher, Head) else teacher
        )

    def over_logits(self) -> Call:
        teacher = self.teacher.logits() if isinstance(self.teacher, Head) else self.teacher
        return Call(self.student.logits(), teacher, *self[2:])

    def described(self) -> Call:
        """As if the logits were there."""
        teacher: Any = _described(self.teacher) if isinstance(self.teacher, Head) else self.teacher
        student: Any = _described(self.student)
        return Call(student, teacher, *self[2:])


def _described(head: Head) -> Described:
    requires_grad = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in head[:3])
    input = head.input
    return Described(
        "Tensor", input.dtype, input.device, torch.strided, torch.Size(head.logits_shape), requires_grad
    )  # fmt: skip


def linear_divergence(
    given: Given, chunk_rows: int | None, grad_in_forward: bool | None, hard: Hard | None = None
) -> Tensor:  # fmt: skip
    given = given.each_head(_linear.under_autocast)
    why = _declines(given)
    if why is None and hard is not None and any(isinstance(each, Tensor) for each in hard):
        why = "a parameter that is a tensor"
    if why is not None:
        _route.tell_native(why)
        return _through_logits(given, hard)
    if chunk_rows is None and _linear.is_small(given.student):
        return _through_few_logits(given, hard)
    pair = _pair(given, chunk_rows or 0, hard)
    if not is_compiling():
        of_teacher = 0 if pair.teacher_weight is None else pair.teacher.dtype.itemsize
        second = 0 if hard is None else given.student.input.dtype.itemsize  # the gradient of the other part
        _route.tell(_linear.path(pair.student, of_teacher + second))
    forward, with_grad, _ = _FAMILY.ops
    if _linear.makes_gradients(pair, Options(grad_in_forward=grad_in_forward)):
        loss, *_ = with_grad(*pair, pair.wanted, False)
    else:
        loss, *_ = forward(*pair, False, False, _linear.needs_gradients(pair), False)
    return loss  # type: ignore[no-any-return]


def _declines(given: Given) -> str | None:
    """Why the chunks do not own a call, or None where they do."""
    if extension is None:
        return why_native
    for head in given.heads:
        if why := _linear.declines_head(head, given.student.input.device):
            return why
    call = given.described()
    if call.computed == torch.float64 and call.student.dtype != torch.float64:
        return "a teacher of float64 beside a narrower student"
    return declines(call)


def _through_logits(given: Given, hard: Hard | None) -> Tensor:
    call = given.over_logits()
    loss, _ = divergence(call, False)
    if hard is None or call.labels is None:
        return loss
    reduction = "mean" if given.reduction == "batchmean" else given.reduction
    weight: dict[str, Any] = {} if call.weight is None else {"sample_weight": call.weight}
    of_labels = _route.LOSSES["cross_entropy"].routed(
        call.student, call.labels, None, reduction, call.ignore_index, 0.0, 0.0, 0.0, **weight
    )
    return hard.of_teacher * loss + hard.of_labels * of_labels  # type: ignore[no-any-return]


def _through_few_logits(given: Given, hard: Hard | None) -> Tensor:
    """By torch's matrix products and the fused divergence; of half-precision inputs on a CPU rounding only the result
    and the gradients."""
    result = given.described().result
    if given.student.input.dtype in HALVES and given.student.input.device.type == "cpu":
        given = given.each_head(lambda head: head.cast(in_float))
    return _through_logits(given, hard).to(result)


def _pair(given: Given, chunk_rows: int, hard: Hard | None) -> Pair:
    call, (input, weight, bias, *_) = given.described(), given.student
    of_teacher: Any = given.teacher[:3] if isinstance(given.teacher, Head) else (given.teacher, None, None)
    teacher, teacher_weight, teacher_bias = of_teacher
    of_rows = given.weight
    if given.labels is not None:  # one factor says which rows count
        of_rows = input.new_ones(given.labels.shape, dtype=call.computed) if of_rows is None else of_rows
        of_rows = of_rows.masked_fill(given.labels == given.ignore_index, 0)
    name, over_classes = _REDUCTIONS[given.reduction]
    factors = (1.0, 0.0) if hard is None else (float(hard.of_teacher), float(hard.of_labels))
    return Pair(
        input, weight, bias, teacher, teacher_weight, teacher_bias, of_rows,
        None if hard is None else given.labels, 0 if hard is None else given.ignore_index,
        *factors, _captures.REDUCTIONS[name], over_classes,
        given.direction, given.teacher_is, float(given.temperature), float(given.beta), chunk_rows, call.wide,
    )  # fmt: skip


def _formula(pair: Pair, second: bool, correct: bool) -> Callable[..., tuple[Tensor, None, None]]:
    """A call's loss as a function of its input and head: for derivatives of backward, and for decompositions."""
    shape = (pair.input.shape[0], pair.linear_weight.shape[0])
    teacher: Any = pair.teacher
    if pair.teacher_weight is not None:
        teacher = Head(pair.teacher, pair.teacher_weight, pair.teacher_bias, shape, 1.0)
    reduction = _NAMES[pair.reduction, pair.over_classes]

    def results(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, None, None]:
        student = Head(input, linear_weight, linear_bias, shape, 1.0)
        given = Given(
            student, teacher, pair.labels, pair.row_weight, pair.direction, pair.teacher_is, reduction,
            pair.ignore_index, pair.temperature, pair.beta,
        )  # fmt: skip
        hard = None if pair.labels is None else Hard(pair.of_teacher, pair.of_labels)
        return _through_logits(given, hard).to(pair.result), None, None

    return results


_FAMILY = Family(
    "linear_kl_divergence", Pair, _chunks.TENSORS, _chunks.ARGUMENTS, _chunks.size, _chunks.forward,
    _chunks.forward_with_gradients, _chunks.backward, _formula,
)  # fmt: skip
if extension is not None:
    register(_FAMILY)
