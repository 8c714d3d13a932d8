"""Fake kernels: what shape, dtype and strides each op returns, for tracing without data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Fakes(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _pointwise(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, params: list[float]) -> Tensor:
    return torch.empty_like(input) if reduction == 0 else input.new_empty(())


def _softmax(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, params: list[float]
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(target.shape if reduction == 0 else ())
    arithmetic = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return loss, logits.new_empty((2 * target.numel() + 1,), dtype=arithmetic)


def _backward(upstream: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(input)


pointwise = Fakes(_pointwise, _backward)
softmax = Fakes(_softmax, _backward)
