"""What is measured on a GPU, and the goals it is held to.

Bytes are counted as passes x elements x size, where an element is a logit or a prediction. What a row has besides, a
target of 8 bytes and statistics of 8, is not counted: at 10 classes in bfloat16 it is as much as a pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

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
    fused: Loss
    eager: Loss
    timed: dict[str, tuple[int, list[Goal]]]
    tensors: int  # of the input's size that the greediest provider holds at once, to know what fits
    by_rows: bool = False  # (N, C) cross-entropy, which the other packages have too
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
        if self.loss in ("cross-entropy", "softmax focal"):
            target = torch.randint(self.shape[1], self.shape[:1] + self.shape[2:], device="cuda")
        elif self.loss == "sigmoid focal":
            target = torch.randint(2, self.shape, device="cuda", dtype=torch.int8).to(self.dtype)
        else:
            target = torch.randn(self.shape, dtype=self.dtype, device="cuda")
        return input.requires_grad_(), target


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


def eager_huber(input: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(input, target)


def fused_huber(input: Tensor, target: Tensor) -> Tensor:
    return L.huber_loss(input, target)


def eager_sigmoid_focal(input: Tensor, target: Tensor) -> Tensor:
    """The formula of ``torchvision.ops.sigmoid_focal_loss``."""
    p = torch.sigmoid(input)
    ce = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    return ((ALPHA * target + (1 - ALPHA) * (1 - target)) * (ce * ((1 - p_t) ** GAMMA))).mean()


def fused_sigmoid_focal(input: Tensor, target: Tensor) -> Tensor:
    return L.sigmoid_focal_loss(input, target, ALPHA, GAMMA, "mean")


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
    return Case("cross-entropy", shape, dtype, fused_cross_entropy, eager_cross_entropy, timed, 7, by_rows, variants)


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
        huber, focal = ({BOTH: (3, [of_copy(0.9), Goal("eager", times)])} for times in (2, 20))
        yield Case("Huber", (1 << 28,), dtype, fused_huber, eager_huber, huber, 8)
        yield Case("sigmoid focal", (1 << 28,), dtype, fused_sigmoid_focal, eager_sigmoid_focal, focal, 24)
    # Launches are counted by tests/test_gpu.py.
    call = {CALL: (0, [Goal("eager", 1)])}
    for rows in (4, 32):
        yield cross_entropy((rows, 10), torch.float32, call)
    yield Case("softmax focal", (32, 10), torch.float32, fused_focal, eager_focal, call, 8)
    yield Case("Huber", (64,), torch.float32, fused_huber, eager_huber, call, 8)
    yield Case("sigmoid focal", (64,), torch.float32, fused_sigmoid_focal, eager_sigmoid_focal, call, 24)
