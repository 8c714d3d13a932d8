"""The three passes over the chunks: forward, forward with the gradients, and backward."""

from typing import Any

import torch
from torch import Tensor

from . import _by_classes, _scale
from ._call import MEAN, MEAN_OR_ZERO, NONE, SUM, Call
from ._chunks import row_length
from ._gradients import Gradients
from ._kept import Kept, size
from ._rows import Chunk, Right, Rows


def _op(call: Call, suffix: str = "") -> Any:
    return getattr(torch.ops.fusedloss, call.loss + suffix)


class Logits:
    """The logits of one chunk after the other, in the same memory."""

    def __init__(self, call: Call, rows: Rows) -> None:
        self.call = call
        most = max((end - start for start, end in rows.bounds()), default=0)
        self.columns = call.linear_weight.shape[0]
        length = row_length(self.columns, call.input.dtype, call.input.device.type)
        self.memory = call.input.new_empty(most, length)[:, : self.columns]

    def of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """As (rows, C * K) and as the kernels read them: (rows, C) or (rows, C, K)."""
        flat = self.of_rows(chunk.input)
        return flat, flat.view(self.call.logits_shape(chunk.size))

    def of_rows(self, input: Tensor) -> Tensor:
        flat = self.memory[: input.shape[0]]
        self.call.logits_of(input, slice(0, self.columns), flat)
        return flat


def reduced(call: Call, rows: Rows, total: Tensor) -> Tensor:
    return (total if call.reduction == SUM else total / rows.divisor).to(call.result)


def forward(
    call: Call, second: bool, correct: bool, keep: bool, grad_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the second result, which rows are right, what backward needs of the rows, and, for an upstream gradient
    of 1, the gradient of the input."""
    rows = Rows(call, second)
    new = call.input.new_zeros
    losses = new(call.row_shape, dtype=call.arithmetic)
    of_second = new(call.row_shape if second else 0, dtype=call.arithmetic)
    right = Right(rows, correct)
    memory = new(size(call) if keep else 0, dtype=call.arithmetic)
    kept = Kept(call, memory) if keep else None
    gradients = Gradients(call, [True, False, False], 1, _scale.of_reduction(call, rows, None)) if grad_input else None
    logits = Logits(call, rows)
    for chunk in rows.chunks():
        flat, seen = logits.of(chunk)
        value, value_of_second, statistics = _op(call)(
            seen, chunk.target, call.weight, NONE, call.ignore_index, call.params, True, second or call.by_classes,
            chunk.sample_weight,
        )  # fmt: skip
        chunk.put(losses, value)
        if second:
            chunk.put(of_second, value_of_second)
        right.add(chunk, seen)
        if kept is not None:
            kept.put(chunk.start, chunk.end, statistics, value_of_second)
        if gradients is not None:
            _gradient_in_place(call, chunk, seen, losses.new_ones(()), None, statistics)
            gradients.add(chunk, flat)
    # In float64, so that no number of threads changes the sum in float32.
    loss = losses.to(call.result) if call.reduction == NONE else reduced(call, rows, losses.sum(dtype=torch.float64))
    made = call.input.new_empty(0) if gradients is None else gradients.finish()[0]
    return loss, of_second.to(call.result), right.finish(), memory, made


def _gradient_in_place(
    call: Call, chunk: Chunk, logits: Tensor, upstream: Tensor, upstream_second: Tensor | None, statistics: Tensor
) -> None:
    """``upstream``: of the sum of the losses, or one number for each."""
    _op(call, "_backward_")(
        upstream, upstream_second, logits, chunk.target, call.weight, statistics, SUM if upstream.dim() == 0 else NONE,
        call.ignore_index, call.params, chunk.sample_weight,
    )  # fmt: skip


def forward_with_gradients(call: Call, wanted: list[bool], correct: bool) -> tuple[Tensor, ...]:
    """The loss, which rows are right, and the gradients for an upstream gradient of 1."""
    rows = Rows(call, sums=wanted[1])
    right = Right(rows, correct)
    total = call.input.new_zeros((), dtype=torch.float64)
    logits = Logits(call, rows)
    gradients = Gradients(call, wanted, len(rows.bounds()), _scale.of_reduction(call, rows, None))
    for chunk in rows.chunks():
        flat, seen = logits.of(chunk)
        right.add(chunk, seen)
        value, _ = _op(call, "_with_grad_")(
            seen, chunk.target, call.weight, SUM, call.ignore_index, call.params, True, chunk.sample_weight
        )
        total += value
        gradients.add(chunk, flat)
    return reduced(call, rows, total), right.finish(), *gradients.finish()


def backward(
    upstream: Tensor, upstream_second: Tensor | None, call: Call, second: bool, memory: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the logits once more, and their gradient from what forward kept of the rows."""
    by_classes = call.by_classes and wanted[1]
    rows = Rows(call, second, wanted[1] and not by_classes)
    upstream = upstream.to(call.arithmetic)
    scale = _scale.Scale(call.logit_scale)
    if call.reduction != NONE and upstream_second is None:
        kernel = _scale.of_kernel(call)
        scale = _scale.of_reduction(call, rows, upstream, kernel)
        upstream = upstream.new_ones(()) if kernel is None else kernel.to(call.arithmetic)
    elif call.reduction in (MEAN, MEAN_OR_ZERO):
        upstream = rows.share(upstream).to(call.arithmetic)
    kept = Kept(call, memory)
    if by_classes:
        return _by_classes.backward(call, rows, upstream, upstream_second, kept, scale, wanted)
    gradients = Gradients(call, wanted, len(rows.bounds()), scale)
    logits = Logits(call, rows)
    for chunk in rows.chunks():
        flat, seen = logits.of(chunk)
        of_losses = upstream if upstream.dim() == 0 else upstream[chunk.index]
        of_second = None if upstream_second is None else upstream_second[chunk.index].to(call.arithmetic)
        _gradient_in_place(call, chunk, seen, of_losses, of_second, kept.statistics(chunk.start, chunk.end))
        gradients.add(chunk, flat)
    return gradients.finish()
