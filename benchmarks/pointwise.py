"""The pointwise cases: every loss large, in two dtypes, and small, and two of one's own beside the built-in Huber."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from case import Case, Loss, name_of, values, zeros_and_ones
from torch import Tensor

import fusedloss
import fusedloss.functional as L

GAMMA, ALPHA = 2.0, 0.25

# A call through a namespace of functions: torch's, or this package's.
Call = Callable[[Any, Tensor, Tensor], Tensor]


@functools.cache
def _weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)


def with_both_weights(f: Any, x: Tensor, t: Tensor) -> Tensor:
    columns = math.gcd(x.numel(), 64)
    x, t = x.view(-1, columns), t.view(-1, columns)
    weight, pos_weight = _weights(tuple(x.shape), x.dtype), _weights((columns,), x.dtype)
    loss: Tensor = f.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight)
    return loss


def sigmoid_focal(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """Of torch: the formula of ``torchvision.ops.sigmoid_focal_loss``."""
    if f is L:
        return L.sigmoid_focal_loss(x, t, ALPHA, GAMMA, "mean")
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    alpha_t = ALPHA * t + (1 - ALPHA) * (1 - t)
    return (alpha_t * (ce * ((1 - p_t) ** GAMMA))).mean()


# name: the call, its target, and the least speed-up over eager for 4M elements of float32.
LOSSES: dict[str, tuple[Call, Callable[[Tensor, torch.Generator], Tensor], float]] = {
    "huber": (lambda f, x, t: f.huber_loss(x, t), values, 2.0),
    "smooth_l1": (lambda f, x, t: f.smooth_l1_loss(x, t), values, 2.0),
    "mse": (lambda f, x, t: f.mse_loss(x, t), values, 2.0),
    "l1": (lambda f, x, t: f.l1_loss(x, t), values, 3.0),
    "bce": (lambda f, x, t: f.binary_cross_entropy(x, t), zeros_and_ones, 4.0),
    "bce_with_logits": (lambda f, x, t: f.binary_cross_entropy_with_logits(x, t), zeros_and_ones, 4.0),
    "bce_with_logits_and_weights": (with_both_weights, zeros_and_ones, 4.0),
    "sigmoid_focal": (sigmoid_focal, zeros_and_ones, 12.0),
}
LARGE = 1 << 22  # 50.3 MB of float32, 25.2 MB of bfloat16: input and target read, gradient written
SMALL = (1, 64, 1000, 10_000)  # 12 bytes to 120 kB: the cost of a call


def _case(name: str, elements: int, dtype: torch.dtype, **goals: Any) -> Case:
    call, target, _ = LOSSES[name]
    return Case(
        name_of(name, (elements,), dtype),
        (elements,),
        dtype,
        target,
        functools.partial(call, F),
        functools.partial(call, L),
        probabilities=name == "bce",
        **goals,
    )


PSEUDO_HUBER = "delta * delta * (sqrt(1 + square((x - t) / delta)) - 1)"
LOG_COSH = "log(cosh(x - t))"


def _custom(name: str, value: str, params: dict[str, float], eager: Loss) -> Case:
    """As fast as the built-in Huber within a fifth; compiled when it is first called."""

    @functools.cache
    def loss() -> Loss:
        return fusedloss.pointwise_loss(name, value, params=params)

    def fused(x: Tensor, t: Tensor) -> Tensor:
        return loss()(x, t)

    return Case(
        f"custom_{name}-fp32-{LARGE}",
        (LARGE,),
        torch.float32,
        values,
        eager,
        fused,
        peer=("huber", L.huber_loss),
        speedup=1 / 1.2,
        over="huber",
    )


def cases() -> Iterator[Case]:
    for name, (_, _, speedup) in LOSSES.items():
        yield _case(name, LARGE, torch.float32, speedup=speedup, over_compile=1.2, memory=1.05)
    for name in LOSSES:
        yield _case(name, LARGE, torch.bfloat16, speedup=2.0, over_compile=1.2, memory=1.05)
    for name in LOSSES:
        for elements in SMALL:
            yield _case(name, elements, torch.float32, speedup=0.95, compiled=False)
    yield _custom("pseudo_huber", PSEUDO_HUBER, {"delta": 1.0}, lambda x, t: (torch.sqrt(1 + (x - t) ** 2) - 1).mean())
    yield _custom("log_cosh", LOG_COSH, {}, lambda x, t: torch.log(torch.cosh(x - t)).mean())
