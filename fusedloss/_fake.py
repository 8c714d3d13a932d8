"""Fake kernels: what shape, dtype and strides each op returns, for tracing without data."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._dtypes import HALVES
from ._sizes import rows_of

# By the suffix of the op: a loss, its backward, and what makes the gradient in forward or in place.
Fakes = dict[str, Callable[..., Any]]


def nothing(*arguments: Any, **options: Any) -> None:
    return None


def pointwise(traits: Any) -> Fakes:
    """Losses lie in memory as torch's: in the order of the input and the target, or of one alone."""

    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float],
        third: Tensor | None = None, wide: bool = False, ignore_index: int | None = None,
    ) -> Tensor:  # fmt: skip
        dtype = torch.float32 if wide else input.dtype
        if reduction:
            return input.new_empty((), dtype=dtype)
        if traits.result == "same" or ignore_index is not None:
            return torch.empty_like(input, dtype=dtype)
        if traits.result == "of target":
            return torch.empty_like(-target, dtype=dtype)
        if traits.has_third_slope and third is not None:
            return torch.empty_like(third + (input + target), dtype=dtype)
        return torch.empty_like(target + input if traits.target_first else input + target, dtype=dtype)

    def with_grad(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float],
        third: Tensor | None = None, wide: bool = False, ignore_index: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return input.new_empty((), dtype=torch.float32 if wide else input.dtype), torch.empty_like(input)

    def carrying(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return forward(input, *rest), input.new_empty(1, dtype=torch.float32)

    def backward(
        upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float],
        third: Tensor | None = None, wide: bool = False, ignore_index: int | None = None, of: int = 0,
        carrier: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        operand = (input, target, third, target, third)[of]
        dtype = torch.float32 if of > 2 and operand.dtype in HALVES else operand.dtype  # type: ignore[union-attr]
        return torch.empty_like(operand.expand(input.shape), dtype=dtype)  # type: ignore[union-attr]

    return {"": forward, "_with_grad": with_grad, ".carrying": carrying, "_backward": backward}


def statistics(logits: Tensor, saved: int) -> tuple[int, torch.dtype]:
    """How many numbers forward leaves to backward, of which a row has ``saved``, and their dtype."""
    return saved * math.prod(rows_of(logits)) + 1, torch.float64 if logits.dtype == torch.float64 else torch.float32


def softmax(saved_by: Callable[[list[float]], int]) -> Fakes:
    """A row leaves ``saved_by(params)`` numbers to backward."""

    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, params: list[float],
        wide: bool = False, second: bool = False, sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows = rows_of(logits)
        numbers, arithmetic = statistics(logits, saved_by(params))
        dtype = arithmetic if wide else logits.dtype
        loss = logits.new_empty(rows if reduction == 0 else (), dtype=dtype)
        of_second = logits.new_empty(rows if second else (0,), dtype=dtype)
        return loss, of_second, logits.new_empty(numbers, dtype=arithmetic)

    def without_grad(
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, params: list[float],
        wide: bool = False, sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, _, statistics = forward(logits, target, weight, reduction, ignore_index, params, wide)
        return loss, statistics

    def with_grad(logits: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *without_grad(logits, *rest, **options), torch.empty_like(logits)

    def backward(
        upstream: Tensor, upstream_second: Tensor | None, logits: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        return torch.empty_like(logits)

    return {
        "": forward,
        "_with_grad": with_grad,
        "_with_grad_": without_grad,
        ".without_second": without_grad,
        ".carrying": without_grad,
        "_backward": backward,
        "_backward_": nothing,
    }
