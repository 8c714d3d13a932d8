"""What is measured: the softmax family and class indices here, the pointwise family beside it."""

import functools

import pointwise
import torch
import torch.nn.functional as F
from case import Case, name_of
from pointwise import ALPHA, GAMMA
from torch import Tensor

import fusedloss.functional as L
from fusedloss._route import LOSSES

SMOOTHING = 0.1


def class_indices(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(input.shape[1], input.shape[:1] + input.shape[2:], generator=generator)


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


def eager_focal(input: Tensor, target: Tensor) -> Tensor:
    ce = F.cross_entropy(input, target, reduction="none")
    p = torch.exp(-ce)
    return ((1 - p) ** GAMMA * ce).mean()


def fused_focal(input: Tensor, target: Tensor) -> Tensor:
    return L.focal_loss(input, target, gamma=GAMMA)


def native_focal(input: Tensor, target: Tensor) -> Tensor:
    return LOSSES["focal"].native(input, target, None, "mean", -100, 1.0, GAMMA)


def class_or_background(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(input.shape[1] + 1, input.shape[:1] + input.shape[2:], generator=generator)


def eager_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    """As detectors write it: the one-hot is built in every step."""
    one_hot = F.one_hot(target, input.shape[1] + 1)[..., :-1].movedim(-1, 1)
    return pointwise.sigmoid_focal(F, input, one_hot.to(input.dtype))


def fused_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    return L.sigmoid_focal_loss(input, target, ALPHA, GAMMA, "mean")


def native_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    return LOSSES["sigmoid_focal"].native(input, target, None, "mean", ALPHA, GAMMA, ignore_index=-100)


def cross_entropy(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    speedup: float | None = None,
    memory: float | None = 1.05,
    channels_last: bool = False,
) -> Case:
    name = name_of("cross_entropy", shape, dtype) + "-channels_last" * channels_last
    return Case(
        name, shape, dtype, class_indices, eager_cross_entropy, fused_cross_entropy,
        speedup=speedup, memory=memory, channels_last=channels_last,
    )  # fmt: skip


def smoothed_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    """Label smoothing with class weights."""
    name = name_of("smoothed_cross_entropy", shape, torch.float32)
    return Case(name, shape, torch.float32, class_indices, eager_smoothed, fused_smoothed, speedup=speedup, memory=1.05)


def soft_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    name = name_of("soft_cross_entropy", shape, torch.float32)
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


def focal(shape: tuple[int, ...], speedup: float) -> Case:
    name = name_of("focal", shape, torch.float32)
    return Case(
        name,
        shape,
        torch.float32,
        class_indices,
        eager_focal,
        fused_focal,
        native_focal,
        speedup=speedup,
        over="native",
    )


def sigmoid_focal_indexed(shape: tuple[int, ...], speedup: float, memory: float | None = 1.05) -> Case:
    return Case(
        name_of("sigmoid_focal_indexed", shape, torch.float32),
        shape,
        torch.float32,
        class_or_background,
        eager_sigmoid_focal_indexed,
        fused_sigmoid_focal_indexed,
        native_sigmoid_focal_indexed,
        speedup=speedup,
        memory=memory,
    )


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
    focal((2048, 1000), speedup=4.0),  # 16.4 MB
    sigmoid_focal_indexed((100_000, 80), speedup=15.0),  # 64.8 MB; a detector's anchors
    sigmoid_focal_indexed((4, 21, 256, 256), speedup=10.0, memory=None),  # 46.1 MB; classes 256 kB apart
    sigmoid_focal_indexed((100, 8), speedup=1.0, memory=None),  # 7.2 kB
    *pointwise.cases(),
]
