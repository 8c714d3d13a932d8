"""Which rows count, in chunks, and what a mean divides by."""

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ._call import MEAN_OR_ZERO, Call
from ._chunks import bounds


def rows_kept(target: Tensor, ignore_index: int, sample_weight: Tensor | None) -> Tensor | None:
    """Which losses count, or None where all do."""
    kept = None if target.is_floating_point() else target != ignore_index
    if sample_weight is None:
        return kept
    weighed = sample_weight != 0
    return weighed if kept is None else kept & weighed


def in_range(call: Call) -> Tensor:
    """Which class indices name a class. On a CPU those that count all do, and elsewhere the kernels report the rest."""
    return (call.target >= 0) & (call.target < call.logits_shape(1)[1])


def weights_of(call: Call, kept: Tensor) -> Tensor:
    """The class weight of each target, and any for a row that does not count."""
    assert call.weight is not None
    return call.weight[call.target.long().masked_fill(~(kept & in_range(call)), 0)]


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """Where the largest logit is that of the target."""
    return logits.argmax(1) == (target.argmax(1) if target.is_floating_point() else target)


class Chunk:
    """Some of the rows: the inputs, the targets and the weights, and where they belong."""

    def __init__(self, rows: "Rows", start: int, end: int) -> None:
        self.start, self.end, self.size = start, end, end - start
        self.index = slice(start, end) if rows.index is None else rows.index[start:end]
        call = rows.call
        self.input = call.input[self.index]
        if rows.ignored is not None:
            # Its gradient of 0 times a NaN would be NaN in the head's gradient.
            self.input = self.input.masked_fill(rows.ignored[self.index].unsqueeze(1), 0)
        self.target = call.target[self.index]
        self.sample_weight = None if call.sample_weight is None else call.sample_weight[self.index]

    def put(self, rows: Tensor, values: Tensor) -> None:
        rows[self.index] = values


class Rows:
    """The rows that a call computes.

    On a CPU those that are ignored are left out, and so cost nothing. Elsewhere their number is not known without
    waiting for the device, so that all are computed.
    """

    def __init__(
        self, call: Call, second: bool = False, sums: bool = False, kept: Tensor | None = None, of_row: int = 1
    ) -> None:  # fmt: skip
        """``kept``: which losses count, where the target does not say it. ``of_row``: what a mean divides by for each
        row of weight 1."""
        self.call, self.sums, self.of_row = call, sums, of_row
        every_row = second and call.known.traits.second_of_ignored
        self.index: Tensor | None = None  # of the rows that count; None: all
        self.ignored: Tensor | None = None
        self.kept = _kept(call) if kept is None else kept
        if self.kept is None or every_row:
            return
        rows = self.kept if self.kept.dim() == 1 else self.kept.any(1)
        if not call.on_host:
            self.ignored = ~rows
        elif not bool(rows.all()):
            self.index = rows.nonzero().squeeze(1)

    def __len__(self) -> int:
        return self.call.input.shape[0] if self.index is None else self.index.shape[0]

    def bounds(self) -> list[tuple[int, int]]:
        return bounds(len(self), self.call.rows_of_chunk(self.sums))

    def chunks(self) -> Iterator[Chunk]:
        for start, end in self.bounds():
            yield Chunk(self, start, end)

    def spread(self, values: Tensor | None) -> Tensor:
        """A gradient of the rows that count as one of all rows, in the dtype of the input."""
        like = self.call.input
        if values is None:
            return like.new_empty(0)
        if self.index is None:
            return values.to(like.dtype)
        result = like.new_zeros(like.shape)
        result[self.index] = values.to(like.dtype)
        return result

    @cached_property
    def divisor(self) -> Tensor:
        """What a mean divides the sum of the losses by, in float64; infinity for a mean over nothing that is 0."""
        call = self.call
        kept = self.kept
        if call.normalizer is not None:
            return call.normalizer.double()
        if kept is None:
            counted = call.input.new_full((), math.prod(call.row_shape), dtype=torch.float64)
        else:
            of_rows = torch.ones_like(kept, dtype=torch.float64)
            if call.weight is not None and call.known.traits.mean_by_weight:
                of_rows = weights_of(call, kept).double()
            if call.sample_weight is not None:
                of_rows = of_rows * call.sample_weight.double()
            counted = of_rows.masked_fill(~kept, 0).sum()
        counted = counted * self.of_row
        return counted.masked_fill(counted == 0, torch.inf) if call.reduction == MEAN_OR_ZERO else counted

    def share(self, upstream: Tensor | None) -> Tensor:
        """The upstream gradient of each loss of a mean, in float64.

        0 where no row counts: the gradients are 0 then, and infinity times 0 would be NaN.
        """
        share = self.divisor.reciprocal() if upstream is None else upstream.double() / self.divisor
        return share if self.kept is None else share.masked_fill(~self.kept.any(), 0)


class Right:
    """1 for each loss whose largest logit is that of its target, where that is wanted, and otherwise nothing."""

    def __init__(self, rows: Rows, wanted: bool) -> None:
        self.rows, self.wanted = rows, wanted
        call = rows.call
        self.numbers = call.input.new_zeros(call.row_shape if wanted else 0, dtype=call.arithmetic)

    def add(self, chunk: Chunk, logits: Tensor) -> None:
        if self.wanted:
            chunk.put(self.numbers, hits(logits, chunk.target).to(self.numbers.dtype))

    def finish(self) -> Tensor:
        if self.wanted and self.rows.kept is not None:
            self.numbers.masked_fill_(~self.rows.kept, 0)
        return self.numbers


def _kept(call: Call) -> Tensor | None:
    if call.on_host and not call.soft:
        _check_targets(call)
    kept = rows_kept(call.target, call.ignore_index, call.sample_weight)
    if kept is not None and not call.on_host and not call.soft:
        kept &= in_range(call)  # the kernels leave such a row out of a mean
    return kept


def _check_targets(call: Call) -> None:
    """Before anything is computed; elsewhere than on a CPU the kernels report it later."""
    bad = (call.target != call.ignore_index) & ~in_range(call)
    if bool(bad.any()):
        raise IndexError(f"Target {int(call.target[bad][0])} is out of bounds.")
