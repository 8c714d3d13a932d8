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


def with_third(function: Callable[..., Any]) -> Callable[..., Any]:
    """For the kernels of an op, whose third operand is called pos_weight where it weighs the positive term."""

    def named(*arguments: Any, **options: Any) -> Any:
        if "pos_weight" in options:
            options["third"] = options.pop("pos_weight")
        return function(*arguments, **options)

    return named


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

    def carrying(input: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return forward(input, *rest, **options), input.new_empty(1, dtype=torch.float32)

    def backward(
        upstream: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float],
        third: Tensor | None = None, wide: bool = False, ignore_index: int | None = None, of_target: bool = False,
        carrier: Tensor | None = None, of_third: bool = False, unrounded: bool = False,
    ) -> Tensor:  # fmt: skip
        operand = target if of_target else input if third is None or not of_third else third
        dtype = torch.float32 if unrounded and operand.dtype in HALVES else operand.dtype
        return torch.empty_like(operand.expand(input.shape), dtype=dtype)

    fakes: Fakes = {"": forward, "_with_grad": with_grad, ".carrying": carrying, "_backward": backward}
    return {suffix: with_third(fake) for suffix, fake in fakes.items()}


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


def row_sums() -> Fakes:
    def forward(
        first: Tensor, second: Tensor | None, third: Tensor | None, target: Tensor | None, weight: Tensor | None,
        reduction: int, params: list[float], wide: bool = False,
    ) -> Tensor:  # fmt: skip
        rows = first.shape[:-1] if target is None else target.shape
        return first.new_empty(() if reduction else rows, dtype=torch.float32 if wide else first.dtype)

    def backward(
        upstream: Tensor, first: Tensor, second: Tensor | None, third: Tensor | None, target: Tensor | None,
        weight: Tensor | None, reduction: int, params: list[float], wide: bool = False, of_first: bool = True,
        of_second: bool = False, of_third: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        wanted = zip((first, second, third), (of_first, of_second, of_third), strict=True)
        return [each.new_empty(each.shape) for each, want in wanted if want and each is not None]

    return {"": forward, "_backward": backward}
