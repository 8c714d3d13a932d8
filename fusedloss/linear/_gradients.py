"""The gradients of the input and the head, summed over chunks of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import HALVES
from ._call import Call
from ._chunks import BLOCK_ELEMENTS
from ._rows import Chunk


class Scale(NamedTuple):
    """What all gradients are multiplied by."""

    alpha: float  # in the matrix products, where it costs nothing
    factor: Tensor | None = None  # a number that the host need not know


def scaled(data: Tensor, factor: Tensor | None) -> Tensor:
    """In place, by a number that half-precision data do not round first."""
    if factor is not None:
        torch.ops.fusedloss.scale_(data, factor)
    return data


class Gradients:
    """Only what is wanted is made.

    Over several chunks the head's gradient in half precision is summed in float32, in blocks of classes: a block is
    rounded and freed at the end, before the next one.
    """

    def __init__(self, call: Call, wanted: list[bool], chunks: int, scale: Scale) -> None:
        self.weight = call.linear_weight.detach()
        self.alpha, self.factor = scale
        like = call.input
        self.of_input = like.new_zeros(like.shape) if wanted[0] else None
        self.of_weight: Tensor | None = None
        self.of_bias = like.new_zeros(self.weight.shape[0], dtype=call.arithmetic) if wanted[2] else None
        self.sums: list[Tensor] = []
        self.blocks: list[tuple[int, int]] = []
        if wanted[1]:
            if like.dtype in HALVES and (chunks > 1 or self.factor is not None):
                step = max(1, BLOCK_ELEMENTS // max(1, like.shape[1]))
                self.blocks = [(i, min(i + step, self.weight.shape[0])) for i in range(0, self.weight.shape[0], step)]
                self.sums = [like.new_zeros((j - i, like.shape[1]), dtype=call.arithmetic) for i, j in self.blocks]
            else:
                self.of_weight = torch.zeros_like(self.weight) if chunks == 0 else torch.empty_like(self.weight)
        self.first = True

    def add(self, chunk: Chunk, of_logits: Tensor) -> None:
        """``of_logits``: the chunk's gradient by its logits, (rows, C * K)."""
        if self.of_input is not None:
            self._add_to_input(chunk, of_logits)
        if self.of_weight is not None:
            # A beta of 0 reads nothing of what is there.
            beta = 0.0 if self.first else 1.0
            self.of_weight.addmm_(of_logits.t(), chunk.input, beta=beta, alpha=self.alpha)
        for (start, end), total in zip(self.blocks, self.sums, strict=True):
            total.add_(torch.mm(of_logits[:, start:end].t(), chunk.input), alpha=self.alpha)
        if self.of_bias is not None:
            # A sum into another dtype would copy the logits.
            self.of_bias.add_(torch.mm(of_logits.new_ones(1, chunk.size), of_logits)[0], alpha=self.alpha)
        self.first = False

    def _add_to_input(self, chunk: Chunk, of_logits: Tensor) -> None:
        assert self.of_input is not None
        if self.factor is None and isinstance(chunk.index, slice):
            rows = self.of_input[chunk.index]
            torch.addmm(rows, of_logits, self.weight, beta=0, alpha=self.alpha, out=rows)
            return
        rows = of_logits.new_empty(chunk.size, self.weight.shape[1])
        torch.addmm(rows, of_logits, self.weight, beta=0, alpha=self.alpha, out=rows)
        chunk.put(self.of_input, scaled(rows, self.factor))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the input, the head and its bias, in their dtypes; an empty tensor where one was not wanted."""
        if self.blocks:
            self.of_weight = torch.empty_like(self.weight)
            while self.blocks:
                start, end = self.blocks.pop()
                total = self.sums.pop()
                self.of_weight[start:end] = scaled(total, self.factor)
        elif self.of_weight is not None:
            scaled(self.of_weight, self.factor)
        if self.of_bias is not None:
            scaled(self.of_bias, self.factor)
        none = self.weight.new_empty(0)
        return (
            none if self.of_input is None else self.of_input,
            none if self.of_weight is None else self.of_weight,
            none.new_empty(0) if self.of_bias is None else self.of_bias.to(self.weight.dtype),
        )
