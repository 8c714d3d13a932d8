"""What the linear ops are given."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._captures import REDUCTIONS
from .._dtypes import HALVES
from .._library import extension
from ._chunks import product_parts, rule

NONE, MEAN, SUM = (REDUCTIONS[name] for name in ("none", "mean", "sum"))
MEAN_OR_ZERO = 3 if extension is None else extension.mean_or_zero


ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight, "
    "Tensor? normalizer, str loss, int reduction, int ignore_index, float[] params, float logit_scale, int chunk_rows, "
    "bool wide, bool by_classes"
)
TENSORS = 7


class Call(NamedTuple):
    """A loss over ``logits = logit_scale * (input @ linear_weight.T + linear_bias)``.

    With K positions a row of logits is C x K: a loss for each position.
    """

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C * K, D)
    linear_bias: Tensor | None  # (C * K)
    target: Tensor  # class indices (N) or (N, K), or probabilities (N, C) or (N, C, K)
    weight: Tensor | None  # (C)
    sample_weight: Tensor | None  # as class indices
    normalizer: Tensor | None  # divides the sum in place of what a mean counts
    loss: str  # of the softmax family
    reduction: int
    ignore_index: int
    params: list[float]
    logit_scale: float
    chunk_rows: int  # 0: by the rule
    wide: bool  # results in float32 for half-precision inputs
    by_classes: bool  # backward goes over blocks of classes: see _by_classes

    @property
    def known(self) -> Any:
        return extension.losses[self.loss]  # type: ignore[union-attr]

    @property
    def wanted(self) -> list[bool]:
        """Which of the input, the head and its bias require a gradient."""
        return [each is not None and each.requires_grad for each in self[:3]]

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def row_shape(self) -> torch.Size:
        """One number for each loss."""
        return self.target.shape[:1] + self.target.shape[2:] if self.soft else self.target.shape

    def logits_shape(self, rows: int) -> tuple[int, ...]:
        positions = self.row_shape[1:]
        return (rows, self.linear_weight.shape[0] // positions.numel(), *positions)

    def logits_of(self, input: Tensor, part: slice, result: Tensor) -> None:
        """The logits of some rows and some of the C * K columns."""
        transposed = self.linear_weight.detach().t()
        bias, scale = self.linear_bias, self.logit_scale
        for within in product_parts(part.stop - part.start, input.dtype, input.device.type):
            columns, block = slice(part.start + within.start, part.start + within.stop), result[:, within]
            if bias is not None:
                torch.addmm(bias.detach()[columns], input, transposed[:, columns], beta=scale, alpha=scale, out=block)
            else:
                torch.addmm(block, input, transposed[:, columns], beta=0, alpha=scale, out=block)

    def rows_of_chunk(self, sums: bool) -> int:
        """``sums``: whether a gradient of the head is summed over the chunks."""
        (rows, features), columns = self.input.shape, self.linear_weight.shape[0]
        return self.chunk_rows or rule(rows, columns, features if sums else 0, self.input.dtype, self.input.device.type)

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.float32 if self.input.dtype in HALVES else self.input.dtype

    @property
    def result(self) -> torch.dtype:
        return self.arithmetic if self.wide else self.input.dtype

    @property
    def on_host(self) -> bool:
        """Whether reading a number waits for nothing."""
        return self.input.device.type == "cpu"
