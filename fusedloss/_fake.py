"""Fake kernels: what shape, dtype and strides each op returns, for tracing without data."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# By the suffix of the op: a loss, its backward, and what makes the gradient in forward or in place.
Fakes = dict[str, Callable[..., Any]]


def _pointwise(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float]) -> Tensor:
    return torch.empty_like(input) if reduction == 0 else input.new_empty(())


def _pointwise_with_grad(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return input.new_empty(()), torch.empty_like(input)


def _softmax(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, params: list[float]
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(target.shape if reduction == 0 else ())
    arithmetic = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return loss, logits.new_empty((2 * target.numel() + 1,), dtype=arithmetic)


def _softmax_with_grad(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_softmax(logits, *rest), torch.empty_like(logits)


def _indexed(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, params: list[float]
) -> Tensor:
    return torch.empty_like(logits) if reduction == 0 else logits.new_empty(())


def _backward(upstream: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


def nothing(*arguments: Any) -> None:
    return None


pointwise: Fakes = {"": _pointwise, "_with_grad": _pointwise_with_grad, "_backward": _backward}
indexed: Fakes = {"": _indexed, "_with_grad": _pointwise_with_grad, "_backward": _backward}
softmax: Fakes = {
    "": _softmax,
    "_with_grad": _softmax_with_grad,
    "_with_grad_": _softmax,
    "_backward": _backward,
    "_backward_": nothing,
}
