"""What is measured on a GPU, and the goals it is held to.

Bytes are counted as passes x elements x size, where an element is a logit or a prediction. What a row has besides, a
target of 8 bytes and statistics of 8, is not counted: at 10 classes in bfloat16 it is as much as a pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss.functional as L

from .results import Goal

Loss = Callable[[Tensor, Tensor], Tensor]  # (input, target) to the mean

FORWARD, BACKWARD, BOTH, IN_FORWARD = "forward", "backward", "forward + backward", "forward + backward, grad_in_forward"
CALL = "a call, forward + backward"
GAMMA, ALPHA = 2.0, 0.25


@dataclass(frozen=True)
class Case:
    """One loss at one size. `timed` has the passes over the elements that are counted for it, and its goals."""

    loss: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: Callable[[Tensor], Tensor]  # for an input
    fused: Loss
    eager: Loss
    timed: dict[str, tuple[int, list[Goal]]]
    tensors: int  # of the input's size that the greediest provider holds at once, to know what fits
    by_rows: bool = False  # (N, C) cross-entropy, which the other packages have too
    probabilities: bool = False  # as inputs
    variants: dict[str, Loss] = field(default_factory=dict)  # of ours, by what is timed

    @property
    def name(self) -> str:
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.loss} {kind} {' x '.join(map(str, self.shape))}"

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def most_bytes(self) -> int:
        return self.tensors * self.elements * self.dtype.itemsize

    def data(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        input = torch.randn(self.shape, dtype=self.dtype, device="cuda")
        if self.probabilities:
            input.div_(2).sigmoid_()  # not of more: at 1, which bfloat16 rounds to, a slope may be 1e12
        return input.requires_grad_(), self.target(input)


def class_indices(input: Tensor) -> Tensor:
    return torch.randint(input.shape[1], input.shape[:1] + input.shape[2:], device=input.device)


def zeros_and_ones(input: Tensor) -> Tensor:
    return torch.randint_like(input, 2, dtype=torch.int8).to(input.dtype)


def eager_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target)


def fused_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target)


def cross_entropy_in_forward(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target, grad_in_forward=True)


def eager_focal(input: Tensor, target: Tensor) -> Tensor:
    ce = F.cross_entropy(input, target, reduction="none")
    return ((1 - torch.exp(-ce)) ** GAMMA * ce).mean()


def fused_focal(input: Tensor, target: Tensor) -> Tensor:
    return L.focal_loss(input, target, gamma=GAMMA)


# A loss by its name in a namespace of functions: torch's, or ours.
Call = Callable[[Any, Tensor, Tensor], Tensor]


def bce_with_pos_weight(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """One factor for each of 64 classes, read through its strides; the first targets will do."""
    x, t = x.view(-1, 64), t.view(-1, 64)
    loss: Tensor = f.binary_cross_entropy_with_logits(x, t, pos_weight=t[0])
    return loss


def sigmoid_focal(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """Of torch: the formula of ``torchvision.ops.sigmoid_focal_loss``."""
    if f is L:
        return L.sigmoid_focal_loss(x, t, ALPHA, GAMMA, "mean")
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((ALPHA * t + (1 - ALPHA) * (1 - t)) * (ce * ((1 - p_t) ** GAMMA))).mean()


# name: the call, its target, the least speed-up over eager, and the tensors that eager or its compilation holds.
POINTWISE: dict[str, tuple[Call, Callable[[Tensor], Tensor], float, int]] = {
    "Huber": (lambda f, x, t: f.huber_loss(x, t), torch.randn_like, 2, 8),
    "sigmoid focal": (sigmoid_focal, zeros_and_ones, 20, 24),
    "SmoothL1": (lambda f, x, t: f.smooth_l1_loss(x, t), torch.randn_like, 2, 8),
    "MSE": (lambda f, x, t: f.mse_loss(x, t), torch.randn_like, 2, 8),
    "L1": (lambda f, x, t: f.l1_loss(x, t), torch.randn_like, 2, 8),
    "BCE": (lambda f, x, t: f.binary_cross_entropy(x, t), zeros_and_ones, 2, 8),
    "BCE with logits": (lambda f, x, t: f.binary_cross_entropy_with_logits(x, t), zeros_and_ones, 4, 16),
    "BCE with logits, pos_weight": (bce_with_pos_weight, zeros_and_ones, 4, 16),
}
QUICK = ("Huber", "sigmoid focal")


def of_copy(share: float) -> Goal:
    return Goal("copy", share)


# All goals of rows: 1 read; 1 read and 1 write; their sum; and what stays on the chip between the two.
ROWS = {
    FORWARD: (1, [of_copy(0.9)]),
    BACKWARD: (2, [of_copy(0.9)]),
    BOTH: (
        3,
        [
            of_copy(0.9),
            Goal("eager", 3),
            Goal("compile", 1.2),
            Goal("Liger", 1),
            Goal("QuACK", 1),
            Goal("flash-attn", 1),
        ],
    ),
    IN_FORWARD: (2, [of_copy(0.85)]),
}


def cross_entropy(
    shape: tuple[int, ...], dtype: torch.dtype, timed: dict[str, tuple[int, list[Goal]]], by_rows: bool = False
) -> Case:
    variants: dict[str, Loss] = {IN_FORWARD: cross_entropy_in_forward}
    losses = fused_cross_entropy, eager_cross_entropy
    return Case("cross-entropy", shape, dtype, class_indices, *losses, timed, 7, by_rows, variants=variants)


def pointwise(name: str, elements: int, dtype: torch.dtype, timed: dict[str, tuple[int, list[Goal]]]) -> Case:
    call, target, _, tensors = POINTWISE[name]
    losses = partial(call, L), partial(call, F)
    return Case(name, (elements,), dtype, target, *losses, timed, tensors, probabilities=name == "BCE")


def cases(quick: bool) -> Iterator[Case]:
    """Quick leaves one or two of each kind."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    long = ((32768, 32000), (32768, 50257)) if quick else tuple((32768, c) for c in (1024, 4096, 32000, 50257))
    for dtype in dtypes:
        for shape in (*long, (8192, 128256)):
            yield cross_entropy(shape, dtype, ROWS, by_rows=True)
    images = {BOTH: (3, [of_copy(0.8), Goal("eager", 4)])}
    yield cross_entropy((8, 21, 1024, 1024), torch.bfloat16, images)
    for dtype in dtypes:
        for classes in (100,) if quick else (10, 32, 100, 1000):
            yield cross_entropy((1_000_000, classes), dtype, {BOTH: (3, [of_copy(0.75)])})
    for dtype in dtypes:
        for name in QUICK if quick else POINTWISE:
            yield pointwise(name, 1 << 28, dtype, {BOTH: (3, [of_copy(0.9), Goal("eager", POINTWISE[name][2])])})
    # Launches are counted by tests/test_gpu.py.
    call = {CALL: (0, [Goal("eager", 1)])}
    for rows in (4, 32):
        yield cross_entropy((rows, 10), torch.float32, call)
    yield Case("softmax focal", (32, 10), torch.float32, class_indices, fused_focal, eager_focal, call, 8)
    for name in QUICK if quick else POINTWISE:
        yield pointwise(name, 64, torch.float32, call)
