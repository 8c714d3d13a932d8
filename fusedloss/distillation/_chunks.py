"""A divergence from hidden states and a head, one chunk of both sides' logits at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._library import extension
from ..linear import _scale
from ..linear._call import NONE, SUM, Call
from ..linear._gradients import Gradients
from ..linear._kept import for_kernel
from ..linear._passes import Logits, reduced
from ..linear._rows import Chunk, Rows
from ..linear._scale import OF_HALF, Scale

# csrc/kernels/distillation.h: kSavedOfPair, of which the last is the constant of csrc/losses/distillation.h.
SAVED = 5

ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor teacher, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? row_weight, Tensor? labels, int ignore_index, float of_teacher, float of_labels, "
    "int reduction, bool over_classes, str direction, str teacher_is, float temperature, float beta, int chunk_rows, "
    "bool wide"
)
TENSORS = 8
_PARAMS = [0.0, 0.0, 0.0]  # a cross-entropy without smoothing, z-loss and softcap


class Pair(NamedTuple):
    """A student's hidden states and head, and a teacher's, or the teacher's numbers themselves."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None
    teacher: Tensor  # (N, D of the teacher), or (N, C) without a teacher_weight
    teacher_weight: Tensor | None  # (C, D of the teacher)
    teacher_bias: Tensor | None
    row_weight: Tensor | None  # (N); a row of weight 0 does not count
    labels: Tensor | None  # (N), whose cross-entropy is added; None: the divergence alone
    ignore_index: int  # of these labels
    of_teacher: float  # what the divergence is multiplied by
    of_labels: float  # and the cross-entropy
    reduction: int
    over_classes: bool  # a mean divides by the classes of its rows too
    direction: str
    teacher_is: str
    temperature: float
    beta: float
    chunk_rows: int
    wide: bool  # results in the dtype of the arithmetic

    @property
    def student(self) -> Call:
        """As the chunks of a linear loss are given, with the teacher's side for the target of a row."""
        return self._call(self.input, self.linear_weight, self.linear_bias)

    @property
    def teacher_head(self) -> Call | None:
        if self.teacher_weight is None:
            return None
        return self._call(self.teacher, self.teacher_weight, self.teacher_bias)

    def _call(self, input: Tensor, head: Tensor, bias: Tensor | None) -> Call:
        return Call(
            input, head, bias, self.teacher, None, self.row_weight, None, "kl_divergence", self.reduction, 0, [], 1.0,
            self.chunk_rows, self.wide, False,
        )  # fmt: skip

    @property
    def wanted(self) -> list[bool]:
        return self.student.wanted

    @property
    def row_shape(self) -> torch.Size:
        return self.input.shape[:1]

    @property
    def arithmetic(self) -> torch.dtype:
        return self.student.arithmetic

    @property
    def result(self) -> torch.dtype:
        return self.student.result

    @property
    def kind(self) -> tuple[str, str, float, float]:
        """What the ops over rows are given beside them."""
        return self.direction, self.teacher_is, self.temperature, self.beta

    def rows(self, sums: bool = False) -> Rows:
        return Rows(self.student, sums=sums, of_row=self.linear_weight.shape[0] if self.over_classes else 1)


def size(pair: Pair) -> int:
    """The numbers that forward keeps for backward."""
    return _saved(pair) * pair.input.shape[0]


def _saved(pair: Pair) -> int:
    """For each row: what the divergence's backward reads, then what the cross-entropy's does."""
    if pair.labels is None:
        return SAVED
    return SAVED + int(extension.losses["cross_entropy"].saved_by(_PARAMS))  # type: ignore[union-attr]


class _Teacher:
    """The teacher's side of one chunk after the other: a part of what is there, or logits in the same memory."""

    def __init__(self, pair: Pair, rows: Rows) -> None:
        head = pair.teacher_head
        self.logits = None if head is None else Logits(head, rows)

    def of(self, chunk: Chunk) -> Tensor:
        return chunk.target if self.logits is None else self.logits.of_rows(chunk.target)


class _Labels:
    """The labels' side: the same logits once more, for the other gradient."""

    def __init__(self, pair: Pair, logits: Logits) -> None:
        self.memory = None if pair.labels is None else torch.empty_like(logits.memory)

    def copy_of(self, chunk: Chunk, flat: Tensor) -> Tensor | None:
        return None if self.memory is None else self.memory[: chunk.size].copy_(flat)


def forward(pair: Pair, second: bool, correct: bool, keep: bool, grad_input: bool) -> tuple[Tensor, ...]:
    """The loss, and what backward needs of the rows. There is no second result, and no gradient of the input alone."""
    call, rows = pair.student, pair.rows()
    losses = call.input.new_zeros(pair.row_shape, dtype=call.arithmetic)
    kept = call.input.new_zeros(size(pair) if keep else 0, dtype=call.arithmetic)
    logits, teacher = Logits(call, rows), _Teacher(pair, rows)
    direction, teacher_is, temperature, beta = pair.kind
    for chunk in rows.chunks():
        flat, _ = logits.of(chunk)
        values, _, statistics, _ = torch.ops.fusedloss.kl_divergence(
            flat, teacher.of(chunk), None, chunk.sample_weight, direction, teacher_is, "none", 0, temperature, beta,
            True, False, False,
        )  # fmt: skip
        if pair.labels is not None:
            of_labels, _, more = torch.ops.fusedloss.cross_entropy(
                flat, pair.labels[chunk.index], None, NONE, pair.ignore_index, _PARAMS, True, False,
                chunk.sample_weight,
            )  # fmt: skip
            values = pair.of_teacher * values + pair.of_labels * of_labels
            statistics = torch.cat([statistics, more[:-1]])
        chunk.put(losses, values)
        if keep:
            kept.view(_saved(pair), -1)[:, chunk.start : chunk.end] = statistics.view(_saved(pair), -1)
    # In float64, so that no number of threads changes the sum in float32.
    whole = call.reduction == NONE
    loss = losses.to(call.result) if whole else reduced(call, rows, losses.sum(dtype=torch.float64))
    nothing = [call.input.new_empty(0, dtype=dtype) for dtype in (call.result, call.arithmetic, call.input.dtype)]
    return loss, nothing[0], nothing[1], kept, nothing[2]


def forward_with_gradients(pair: Pair, wanted: list[bool], correct: bool) -> tuple[Tensor, ...]:
    """The loss, and the gradients for an upstream gradient of 1."""
    call, rows = pair.student, pair.rows(wanted[1])
    total = call.input.new_zeros((), dtype=torch.float64)
    logits, teacher = Logits(call, rows), _Teacher(pair, rows)
    labels = _Labels(pair, logits)
    gradients = Gradients(call, wanted, len(rows.bounds()), _of_teacher(pair, _scale.of_reduction(call, rows, None)))
    for chunk in rows.chunks():
        flat, _ = logits.of(chunk)
        other = labels.copy_of(chunk, flat)
        value = torch.ops.fusedloss.kl_divergence_with_grad_(flat, teacher.of(chunk), chunk.sample_weight, *pair.kind)
        total += pair.of_teacher * value.double()
        if other is not None and pair.labels is not None:
            of_labels, _ = torch.ops.fusedloss.cross_entropy_with_grad_(
                other, pair.labels[chunk.index], None, SUM, pair.ignore_index, _PARAMS, True, chunk.sample_weight
            )
            total += pair.of_labels * of_labels.double()
            flat.add_(other, alpha=pair.of_labels / pair.of_teacher)
        gradients.add(chunk, flat)
    return reduced(call, rows, total), call.input.new_empty(0, dtype=call.arithmetic), *gradients.finish()


def backward(
    upstream: Tensor, upstream_second: Tensor | None, pair: Pair, second: bool, kept: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes both sides' logits once more, and the gradient from what forward kept of the rows."""
    call, rows = pair.student, pair.rows(wanted[1])
    numbers = kept.view(_saved(pair), -1)
    upstream, scale = upstream.to(call.arithmetic), Scale(call.logit_scale)
    if call.reduction != NONE:
        kernel = _of_kernel(pair, numbers)
        scale = _scale.of_reduction(call, rows, upstream, kernel)
        upstream = upstream.new_ones(()) if kernel is None else kernel.to(call.arithmetic)
    gradients = Gradients(call, wanted, len(rows.bounds()), _of_teacher(pair, scale))
    logits, teacher = Logits(call, rows), _Teacher(pair, rows)
    labels = _Labels(pair, logits)
    for chunk in rows.chunks():
        flat, _ = logits.of(chunk)
        of_losses = upstream if upstream.dim() == 0 else upstream[chunk.index]
        statistics = numbers[:SAVED, chunk.start : chunk.end].flatten()
        other = labels.copy_of(chunk, flat)
        torch.ops.fusedloss.kl_divergence_backward_(
            of_losses, flat, teacher.of(chunk), chunk.sample_weight, statistics, *pair.kind
        )
        if other is not None and pair.labels is not None:
            torch.ops.fusedloss.cross_entropy_backward_(
                of_losses, None, other, pair.labels[chunk.index], None,
                for_kernel(numbers[SAVED:, chunk.start : chunk.end]), SUM if of_losses.dim() == 0 else NONE,
                pair.ignore_index, _PARAMS, chunk.sample_weight,
            )  # fmt: skip
            flat.add_(other, alpha=pair.of_labels / pair.of_teacher)
        gradients.add(chunk, flat)
    return gradients.finish()


def _of_teacher(pair: Pair, scale: Scale) -> Scale:
    """Both parts are added as one that is divided by the teacher's factor, which the products bring in again."""
    return scale._replace(alpha=scale.alpha * pair.of_teacher)


def _of_kernel(pair: Pair, numbers: Tensor) -> Tensor | None:
    """A power of two that keeps a float16 gradient of the logits in range. None: other types need nothing.

    No class has a larger gradient than 1 more than the row's constant: that is the teacher's mass, the reverse
    divergence, or the Jensen-Shannon divergence's part of it, whose terms below 0 add up to 1 at most.
    """
    if pair.input.dtype != torch.float16:
        return None
    largest = (1 + numbers[SAVED - 1].double().nan_to_num(0, 0, 0).max()) / pair.temperature
    largest = largest + abs(pair.of_labels / pair.of_teacher)
    if pair.row_weight is not None:
        largest = largest * pair.row_weight.double().abs().max().clamp_min(1)
    return torch.exp2(torch.log2(OF_HALF / largest).floor())
