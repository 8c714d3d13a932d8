"""A linear loss over this rank's part of a head: its chunks, and its gradients with those of the other ranks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..linear._call import NONE, Call
from ..linear._chunks import rule
from ..linear._gradients import Gradients
from ..linear._route import Head
from ..linear._rows import Chunk, Rows
from ..linear._scale import Scale
from . import _exchange
from ._local import NOWHERE
from ._rows import Given, differentiable, head_of
from ._shards import Shard


class Work(NamedTuple):
    """A loss over this rank's part of a head."""

    call: Call  # its target: the columns
    given: Given
    sums_input: bool  # whether the gradient of the input is that of all ranks

    def rows(self, sums: bool = False) -> Rows:
        return Rows(self.call, self.given.asked.every_lse, sums, kept=self.given.valid)

    def sums(self, rows: Rows, scale: Scale, wanted: list[bool]) -> "_Sums":
        return _Sums(self.call, wanted, len(rows.bounds()), scale, self.given.shard if self.sums_input else None)

    def head(self) -> Tensor:
        return head_of(self.call.input.dtype, self.given, self.blank(0))

    def blank(self, *sizes: int) -> Tensor:
        return self.call.input.new_zeros(sizes, dtype=self.call.arithmetic)

    def without_operands(self) -> "Work":
        """For a context, which saves them as autograd asks it to."""
        nothing = self.call.input.new_empty(0).detach()
        return self._replace(call=self.call._replace(input=nothing, linear_weight=nothing, linear_bias=None))

    def results(self, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, ...]:
        """Through the logits of this rank: with derivatives of every order, which communicate."""
        if self.sums_input:
            input = _exchange.shared(input, self.given.shard)
        rows, *positions = self.given.column.shape
        shape = (rows, linear_weight.shape[0] // max(1, math.prod(positions)), *positions)
        return differentiable(
            Head(input, linear_weight, linear_bias, shape, self.call.logit_scale).logits(), self.given
        )


def work(
    head: Head, given: Given, classes_weighed: int, chunk_rows: int | None, sums_input: bool, in_forward: bool
) -> Work:  # fmt: skip
    """With a number of rows of a chunk that is the same on every rank, as if the classes were cut evenly."""
    shard, (rows, features) = given.shard, head.input.shape
    columns = max(1, -(-shard.total // shard.ranks)) * math.prod(head.logits_shape[2:])
    summed = features if head.linear_weight.requires_grad else 0
    step = chunk_rows or rule(rows, columns, summed, head.input.dtype, head.input.device.type)
    # What the order of the collectives depends on is told the other ranks, as a target is.
    plan = classes_weighed * 2**32 + step * 8 + 4 * in_forward + 2 * sums_input + head.input.requires_grad
    seen = torch.cat([given.seen.flatten(), given.seen.new_full((1,), plan)])
    return Work(call_of(head, given, step), given._replace(seen=seen), sums_input)


def call_of(head: Head, given: Given, chunk_rows: int) -> Call:
    return Call(
        head.input, head.linear_weight, head.linear_bias, given.column, None, None, None, "cross_entropy", NONE,
        NOWHERE, [0.0, 0.0, given.asked.softcap], float(head.logit_scale), chunk_rows, True, False,
    )  # fmt: skip


class _Sums(Gradients):
    """Gradients, of which that of the input is summed over the ranks of ``shard``, one chunk at a time."""

    def __init__(self, call: Call, wanted: list[bool], chunks: int, scale: Scale, shard: Shard | None) -> None:
        super().__init__(call, wanted, chunks, scale)
        self.shard = shard
        self.sent: tuple[Chunk, Tensor] | None = None

    def _add_to_input(self, of_input: Tensor, chunk: Chunk, of_logits: Tensor) -> None:
        super()._add_to_input(of_input, chunk, of_logits)
        if self.shard is not None:
            self._receive(of_input)
            parts = of_input[chunk.index]
            _exchange.start_sum(parts, self.shard)
            self.sent = chunk, parts

    def _receive(self, of_input: Tensor) -> None:
        if self.sent is None:
            return
        chunk, parts = self.sent
        _exchange.arrived(parts)
        if not isinstance(chunk.index, slice):  # a slice is a view
            chunk.put(of_input, parts)
        self.sent = None

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.of_input is not None:
            self._receive(self.of_input)
        return super().finish()
