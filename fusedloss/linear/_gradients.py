"""The gradients of the input and the head, summed over chunks of rows."""

import torch
from torch import Tensor

from .._dtypes import HALVES
from ._call import Call
from ._chunks import blocks, sum_elements
from ._products import add_column_sums, add_product, product, scaled, write_product
from ._rows import Chunk
from ._scale import Scale


class Gradients:
    """Only what is wanted is made.

    Over several chunks the head's gradient in half precision is summed in float32, in blocks of classes: a block is
    rounded and freed at the end, before the next one.
    """

    def __init__(self, call: Call, wanted: list[bool], chunks: int, scale: Scale) -> None:
        self.weight = call.linear_weight.detach()
        self.scale, self.chunks = scale, chunks
        like = call.input
        self.of_input = like.new_zeros(like.shape) if wanted[0] else None
        self.of_weight: Tensor | None = None
        self.of_bias = like.new_zeros(self.weight.shape[0], dtype=call.arithmetic) if wanted[2] else None
        self.sums: list[Tensor] = []
        self.blocks: list[slice] = []
        if wanted[1]:
            if like.dtype in HALVES and chunks > 1 and self.weight.shape[0]:
                self.blocks = blocks(self.weight.shape, sum_elements(like.device.type))
                self.sums = [
                    like.new_zeros((each.stop - each.start, like.shape[1]), dtype=call.arithmetic)
                    for each in self.blocks
                ]
            else:
                self.of_weight = self.weight.new_empty(self.weight.shape)
                if chunks == 0:
                    self.of_weight.zero_()
        self.first = True

    def add(self, chunk: Chunk, of_logits: Tensor) -> None:
        """``of_logits``: the chunk's gradient by its logits, (rows, C * K)."""
        alpha = self.scale.alpha
        if self.of_input is not None:
            self._add_to_input(self.of_input, chunk, of_logits)
        if self.of_weight is not None and self.chunks == 1:
            write_product(self.of_weight, of_logits.t(), chunk.input, self.scale)
        elif self.of_weight is not None:
            # A beta of 0 reads nothing of what is there.
            self.of_weight.addmm_(of_logits.t(), chunk.input, beta=0.0 if self.first else 1.0, alpha=alpha)
        for part, total in zip(self.blocks, self.sums, strict=True):
            add_product(total, of_logits[:, part].t(), chunk.input, alpha)
        if self.of_bias is not None:
            add_column_sums(self.of_bias, of_logits, alpha)
        self.first = False

    def _add_to_input(self, of_input: Tensor, chunk: Chunk, of_logits: Tensor) -> None:
        if isinstance(chunk.index, slice):
            write_product(of_input[chunk.index], of_logits, self.weight, self.scale)
        else:  # some rows of a CPU's tensor, where alpha is all of the scale
            chunk.put(of_input, product(of_logits, self.weight, self.scale.alpha))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the input, the head and its bias, in their dtypes; an empty tensor where one was not wanted."""
        factor = self.scale.factor
        if self.blocks:
            self.of_weight = self.weight.new_empty(self.weight.shape)
            while self.blocks:
                part, total = self.blocks.pop(), self.sums.pop()
                if factor is None:
                    self.of_weight[part] = total
                else:
                    torch.mul(total, factor, out=self.of_weight[part])
        elif self.of_weight is not None and self.chunks > 1:
            scaled(self.of_weight, factor)
        if self.of_bias is not None:
            scaled(self.of_bias, factor)
        none = self.weight.new_empty(0)
        return (
            none if self.of_input is None else self.of_input,
            none if self.of_weight is None else self.of_weight,
            none.new_empty(0) if self.of_bias is None else self.of_bias.to(self.weight.dtype),
        )
