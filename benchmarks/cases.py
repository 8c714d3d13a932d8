"""What is measured: each loss as it is written today and fused, with the goals it is held to."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss.functional as L
from fusedloss._route import LOSSES

Loss = Callable[[Tensor, Tensor], Tensor]  # (input, target) to the mean

GAMMA = 2.0
SMOOTHING = 0.1
ALPHA = 0.25


@dataclass(frozen=True)
class Case:
    """One loss at one size. A goal is a least speed-up, or a most memory in multiples of the input's bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: Callable[[Tensor, torch.Generator], Tensor]
    eager: Loss
    fused: Loss
    native: Loss | None = None  # the formula fusedloss falls back to, where it is not `eager` itself
    speedup: float | None = None
    over: str = "eager"
    memory: float | None = None
    channels_last: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(self.shape, generator=generator).to(self.dtype)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input.requires_grad_(), self.target(input, generator)

    def losses(self) -> dict[str, Loss]:
        """The loss of every provider that needs no compiler."""
        losses = {"eager": self.eager, "fused": self.fused}
        return losses if self.native is None else {**losses, "native": self.native}


def minimum_traffic(input: Tensor, target: Tensor) -> int:
    """Bytes that forward and backward must move: input and target read once, the gradient written once."""
    return 2 * input.nbytes + target.nbytes


def class_indices(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(input.shape[1], input.shape[:1] + input.shape[2:], generator=generator)


def values(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(input.shape, generator=generator).to(input.dtype)


def zeros_and_ones(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, input.shape, generator=generator).to(input.dtype)


def eager_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target)


def fused_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target)


def probabilities(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(input.shape, generator=generator).softmax(1).to(input.dtype)


def eager_smoothed(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target, class_weights(input), label_smoothing=SMOOTHING)


def fused_smoothed(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target, class_weights(input), label_smoothing=SMOOTHING)


@functools.cache
def _class_weights(classes: int) -> Tensor:
    return torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.5


def class_weights(input: Tensor) -> Tensor:
    return _class_weights(input.shape[1])


def eager_huber(input: Tensor, target: Tensor) -> Tensor:
    return F.huber_loss(input, target)


def fused_huber(input: Tensor, target: Tensor) -> Tensor:
    return L.huber_loss(input, target)


def eager_focal(input: Tensor, target: Tensor) -> Tensor:
    ce = F.cross_entropy(input, target, reduction="none")
    p = torch.exp(-ce)
    return ((1 - p) ** GAMMA * ce).mean()


def fused_focal(input: Tensor, target: Tensor) -> Tensor:
    return L.focal_loss(input, target, gamma=GAMMA)


def native_focal(input: Tensor, target: Tensor) -> Tensor:
    return LOSSES["focal"].native(input, target, None, "mean", -100, 1.0, GAMMA)


def eager_sigmoid_focal(input: Tensor, target: Tensor) -> Tensor:
    """The formula of ``torchvision.ops.sigmoid_focal_loss``."""
    p = torch.sigmoid(input)
    ce = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = ALPHA * target + (1 - ALPHA) * (1 - target)
    return (alpha_t * (ce * ((1 - p_t) ** GAMMA))).mean()


def fused_sigmoid_focal(input: Tensor, target: Tensor) -> Tensor:
    return L.sigmoid_focal_loss(input, target, ALPHA, GAMMA, "mean")


def class_or_background(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(input.shape[1] + 1, input.shape[:1] + input.shape[2:], generator=generator)


def eager_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    """As detectors write it: the one-hot is built in every step."""
    one_hot = F.one_hot(target, input.shape[1] + 1)[..., :-1].movedim(-1, 1)
    return eager_sigmoid_focal(input, one_hot.to(input.dtype))


def native_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    return LOSSES["sigmoid_focal_indexed"].native(input, target, None, "mean", -100, ALPHA, GAMMA)


def cross_entropy(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    speedup: float | None = None,
    memory: float | None = 1.05,
    channels_last: bool = False,
) -> Case:
    name = _name("cross_entropy", shape, dtype) + "-channels_last" * channels_last
    return Case(
        name, shape, dtype, class_indices, eager_cross_entropy, fused_cross_entropy,
        speedup=speedup, memory=memory, channels_last=channels_last,
    )  # fmt: skip


def smoothed_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    """Label smoothing with class weights."""
    name = _name("smoothed_cross_entropy", shape, torch.float32)
    return Case(name, shape, torch.float32, class_indices, eager_smoothed, fused_smoothed, speedup=speedup, memory=1.05)


def soft_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    name = _name("soft_cross_entropy", shape, torch.float32)
    return Case(
        name,
        shape,
        torch.float32,
        probabilities,
        eager_cross_entropy,
        fused_cross_entropy,
        speedup=speedup,
        memory=1.05,
    )


def huber(elements: int, dtype: torch.dtype = torch.float32, speedup: float | None = None) -> Case:
    name = _name("huber", (elements,), dtype)
    return Case(name, (elements,), dtype, values, eager_huber, fused_huber, speedup=speedup)


def focal(shape: tuple[int, ...], speedup: float) -> Case:
    name = _name("focal", shape, torch.float32)
    return Case(
        name, shape, torch.float32, class_indices, eager_focal, fused_focal, native_focal, speedup, over="native"
    )


def sigmoid_focal(elements: int, speedup: float) -> Case:
    name = _name("sigmoid_focal", (elements,), torch.float32)
    return Case(
        name, (elements,), torch.float32, zeros_and_ones, eager_sigmoid_focal, fused_sigmoid_focal, speedup=speedup
    )


def sigmoid_focal_indexed(shape: tuple[int, ...], speedup: float, memory: float | None = 1.05) -> Case:
    return Case(
        _name("sigmoid_focal_indexed", shape, torch.float32),
        shape,
        torch.float32,
        class_or_background,
        eager_sigmoid_focal_indexed,
        fused_sigmoid_focal,
        native_sigmoid_focal_indexed,
        speedup,
        memory=memory,
    )


def _name(loss: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"{loss}-{kind}-{'x'.join(map(str, shape))}"


# Beside each case its minimum traffic. A few hundred bytes are no measure of memory, so the smallest have no such goal.
CASES = [
    cross_entropy((512, 32000), speedup=2.5),  # 131 MB
    cross_entropy((257, 50257), speedup=2.5),  # 103 MB; odd rows, none but the first on a cache line
    cross_entropy((64, 128256), speedup=2.5),  # 65.7 MB
    cross_entropy((2048, 1000), speedup=2.5),  # 16.4 MB
    cross_entropy((4, 10), speedup=0.95, memory=None),  # 352 bytes: the cost of a call
    cross_entropy((32, 10), speedup=0.95, memory=None),  # 2.8 kB
    cross_entropy((512, 32000), torch.bfloat16, speedup=2.0),  # 65.5 MB
    cross_entropy((257, 50257), torch.bfloat16, speedup=2.0),  # 51.7 MB
    cross_entropy((64, 128256), torch.bfloat16, speedup=2.0),  # 32.8 MB
    cross_entropy((2048, 1000), torch.bfloat16, speedup=2.0),  # 8.2 MB
    # 46.1 MB; classes 256 kB apart. 8 bytes of statistics a row beside 84 of logits: no goal for memory.
    cross_entropy((4, 21, 256, 256), speedup=3.0, memory=None),
    cross_entropy((4, 21, 256, 256), speedup=3.0, memory=None, channels_last=True),  # 46.1 MB
    cross_entropy((100_000, 21), speedup=1.0, memory=None),  # 17.6 MB; rows of five and a quarter vectors
    cross_entropy((1, 128256), speedup=1.3),  # 1.0 MB; one row, cut into parts for two threads
    smoothed_cross_entropy((2048, 1000), speedup=3.0),  # 16.4 MB
    soft_cross_entropy((512, 32000), speedup=2.5),  # 197 MB
    huber(1 << 22, speedup=1.6),  # 50.3 MB
    huber(1 << 22, torch.bfloat16),  # 25.2 MB
    huber(64),  # 768 bytes
    focal((2048, 1000), speedup=4.0),  # 16.4 MB
    sigmoid_focal(1 << 22, speedup=8.0),  # 50.3 MB
    sigmoid_focal_indexed((100_000, 80), speedup=15.0),  # 64.8 MB; a detector's anchors
    sigmoid_focal_indexed((4, 21, 256, 256), speedup=10.0, memory=None),  # 46.1 MB; classes 256 kB apart
    sigmoid_focal_indexed((100, 8), speedup=1.0, memory=None),  # 7.2 kB
]
