"""Backward over blocks of classes in place of rows, for half-precision cross-entropy of several chunks.

Over chunks of rows the head's gradient is a sum of products, which half precision would round each time, so that it
needs a float32 sum of twice its size. Over blocks of classes each part of it is one product of all rows. In exchange
the logits are made a second time. The gradient of the input is made in forward, or is a float32 sum of N x D.

A row's lse is known, and gives the p_c of any block of its columns. Where the target lies in another block, the
gradient is p_c times a number: the kernel takes such a row for an ignored one whose lse has that number for upstream
gradient. Where the target lies in the block, it completes the row as always.
"""

import torch
from torch import Tensor

from .._dtypes import HALVES
from .._sizes import at_most
from ._call import NONE, Call
from ._chunks import buffer_bytes, in_tiles, row_length
from ._kept import Kept, for_kernel
from ._products import add_column_sums, add_product, scaled, write_product
from ._rows import Chunk, Rows, in_range, weights_of
from ._scale import Scale

_ELSEWHERE = -1
# On CUDA, chunks of so many rows take longer for their products than for the float32 sum's bytes.
_ENOUGH_ROWS = 1024


def pays(call: Call) -> bool:
    """Whether a gradient of the head is made so.

    The gradient of the other columns has to be p_c times a number that does not depend on p.
    """
    smoothing = call.params[0]
    if call.loss != "cross_entropy" or smoothing != 0 or call.input.dtype not in HALVES:
        return False
    rows, columns = call.input.shape[0], call.linear_weight.shape[0]
    device = call.input.device.type
    if call.chunk_rows:
        few = device != "cuda" or call.chunk_rows < _ENOUGH_ROWS
        return few and not at_most(rows, call.chunk_rows)
    row_bytes, buffer = columns * call.input.dtype.itemsize, buffer_bytes(call.input.dtype, device)
    few = device != "cuda" or not at_most(_ENOUGH_ROWS * row_bytes, buffer)
    return few and not at_most(rows * row_bytes, buffer)


class _OfRows:
    """The numbers of all rows that count."""

    def __init__(self, call: Call, rows: Rows, upstream: Tensor, upstream_second: Tensor | None, kept: Kept) -> None:
        whole = Chunk(rows, 0, len(rows))
        self.input, self.target, self.sample_weight = whole.input, whole.target.long(), whole.sample_weight
        self.statistics, self.lse = kept.numbers[:-1, : len(rows)], kept.numbers[-1, : len(rows)]
        # By its lse, a row without a target's column.
        self.of_whole = self.statistics.clone()
        self.of_whole[0] = self.lse
        self.of_whole[1] = 1
        counts = (call.target != call.ignore_index) & in_range(call)
        weight: float | Tensor = 1.0
        if call.weight is not None:
            weight = weights_of(call, counts)[whole.index].to(call.arithmetic)
        counts = counts[whole.index]
        self.upstream = upstream.expand_as(self.lse) if upstream.dim() == 0 else upstream[whole.index]
        _, z_loss, _ = call.params
        of_others = self.upstream * (weight + 2 * z_loss * self.lse)
        if self.sample_weight is not None:
            of_others = of_others * self.sample_weight
        self.of_others = of_others.masked_fill(~counts, 0)
        self.of_lse = None if upstream_second is None else upstream_second[whole.index].to(call.arithmetic)
        self.target = self.target.masked_fill(~counts, _ELSEWHERE)

    def local(self, start: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """For classes from start to end: the targets, the statistics and the upstream gradient of the lse."""
        here = (self.target >= start) & (self.target < end)
        of_lse = self.of_others.masked_fill(here, 0)
        return (
            (self.target - start).masked_fill(~here, _ELSEWHERE),
            for_kernel(torch.where(here, self.statistics, self.of_whole)),
            of_lse if self.of_lse is None else of_lse + self.of_lse,
        )


def backward(
    call: Call, rows: Rows, upstream: Tensor, upstream_second: Tensor | None, kept: Kept, scale: Scale,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the input, the head and its bias. ``upstream``: one number, or one for each loss."""
    if not len(rows):
        head = call.linear_weight
        of_input = torch.zeros_like(call.input) if wanted[0] else rows.spread(None)
        return of_input, head.new_zeros(head.shape), head.new_zeros(head.shape[0] if wanted[2] else 0)
    of_rows = _OfRows(call, rows, upstream, upstream_second, kept)
    _, classes, *positions = call.logits_shape(1)
    each = positions[0] if positions else 1
    weight = call.linear_weight.detach()
    of_weight = weight.new_empty(weight.shape)
    of_bias = weight.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=call.arithmetic)
    sums = torch.zeros_like(of_rows.input, dtype=call.arithmetic) if wanted[0] else None
    step = in_tiles(call.rows_of_chunk(False) * classes // len(rows))  # a buffer of a chunk's size
    dtype, device = weight.dtype, weight.device.type
    buffer = weight.new_empty(len(rows) * row_length(min(step, classes) * each, dtype, device))
    for start in range(0, classes, step):
        end = min(start + step, classes)
        part = slice(start * each, end * each)
        length = row_length((end - start) * each, dtype, device)
        flat = buffer[: len(rows) * length].view(len(rows), length)[:, : (end - start) * each]
        call.logits_of(of_rows.input, part, flat)
        target, statistics, of_lse = of_rows.local(start, end)
        torch.ops.fusedloss.cross_entropy_backward_(
            of_rows.upstream, of_lse, flat.view(len(rows), end - start, *positions), target,
            None if call.weight is None else call.weight[start:end], statistics, NONE, _ELSEWHERE, call.params,
            of_rows.sample_weight,
        )  # fmt: skip
        write_product(of_weight[part], flat.t(), of_rows.input, scale)
        if wanted[2]:
            add_column_sums(of_bias[part], flat, scale.alpha)
        if sums is not None:
            add_product(sums, flat, weight[part], scale.alpha)
    for made in (of_bias, sums):
        if made is not None:
            scaled(made, scale.factor)
    return rows.spread(sums), of_weight, of_bias.to(weight.dtype)
