"""What is measured on each device, and the goals it is held to."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fusedloss
import fusedloss.functional as L

from . import losses
from .case import BACKWARD, BOTH, CALL, FORWARD, IN_FORWARD, Case, Loss, Timing, name_of
from .losses import OF_ROWS, OF_THREE, POINTWISE, class_indices, class_or_background, class_probabilities, values
from .results import COPY, EAGER, INPUT, OURS, Goal


def cpu_timed(
    speedup: float, over: str = EAGER, over_compile: float | None = None, memory: float | None = None
) -> dict[str, Timing]:
    """Input and target are read once and the gradient written once: bytes that forward and backward must move."""
    goals = [Goal(over, speedup)]
    if over_compile is not None:
        goals.append(Goal("compile", over_compile))
    if memory is not None:
        goals.append(Goal(INPUT, most=memory))
    return {BOTH: Timing(2, goals, count_target=True)}


def cross_entropy(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    speedup: float = 1.0,
    memory: float | None = 1.05,
    channels_last: bool = False,
) -> Case:
    name = name_of("cross_entropy", shape, dtype) + "-channels_last" * channels_last
    timed = cpu_timed(speedup, memory=memory)
    return Case(name, shape, dtype, class_indices, losses.CROSS_ENTROPY, timed, channels_last=channels_last)


def smoothed_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    """Label smoothing with class weights."""
    name = name_of("smoothed_cross_entropy", shape, torch.float32)
    return Case(name, shape, torch.float32, class_indices, losses.SMOOTHED, cpu_timed(speedup, memory=1.05))


def row_weighted_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    """A weight for each row."""
    name = name_of("row_weighted_cross_entropy", shape, torch.float32)
    timed = cpu_timed(speedup, memory=1.05)
    return Case(name, shape, torch.float32, class_indices, losses.ROW_WEIGHTED, timed)


def soft_cross_entropy(shape: tuple[int, ...], speedup: float) -> Case:
    name = name_of("soft_cross_entropy", shape, torch.float32)
    return Case(name, shape, torch.float32, class_probabilities, losses.CROSS_ENTROPY, cpu_timed(speedup, memory=1.05))


def distillation(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """The target holds the teacher's logits."""
    timed = cpu_timed(8.0, over_compile=2.0, memory=1.05)
    return Case(name_of("kl_divergence", shape, dtype), shape, dtype, values, losses.DISTILLATION, timed)


def focal(shape: tuple[int, ...], speedup: float) -> Case:
    name = name_of("focal", shape, torch.float32)
    return Case(name, shape, torch.float32, class_indices, losses.FOCAL_AND_NATIVE, cpu_timed(speedup, "native"))


def linear_cross_entropy(
    shape: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    goals: list[Goal],
    providers: dict[str, Loss],
    half_ignored: bool = False,
    **options: Any,
) -> Case:
    """Its cost is that of three matrix products, so that its operations are counted and not its bytes."""
    name = name_of("linear_cross_entropy" + "_half_ignored" * half_ignored, (*shape, classes), dtype)
    return Case(
        name,
        shape,
        dtype,
        losses.half_ignored if half_ignored else class_indices,
        providers,
        {BOTH: Timing(0, goals)},
        classes=classes,
        different=("products", "none ignored"),
        **options,
    )


# At most so many times the products' time; and how much faster than the others.
CPU_LINEAR = {
    torch.float32: [Goal("products", 1 / 1.25), Goal(EAGER, 1)],
    torch.bfloat16: [Goal("products", 1 / 1.5), Goal(EAGER, 1)],
}
# Torch's chunks take up to six times as long; of the largest size in bfloat16, one call was seen to take 100 s.
BESIDE_CHUNKS = [*CPU_LINEAR[torch.float32], Goal("torch's chunks", 4)], losses.LINEAR_AND_CHUNKS
HALF_IGNORED = [Goal("none ignored", 1 / 0.7)], losses.LINEAR_HALF_IGNORED


def cpu_linear(quick: bool) -> Iterator[Case]:
    """A call takes 0.05 seconds, or up to 4."""
    shape, classes = (256, 512), 16000  # 13 GFLOP; 16 MB of float32 logits
    for dtype, goals in CPU_LINEAR.items():
        yield linear_cross_entropy(shape, classes, dtype, goals, losses.LINEAR)
        yield linear_cross_entropy(shape, classes, dtype, *HALF_IGNORED, half_ignored=True, compiled=False)
    if quick:
        return
    for dtype, goals in CPU_LINEAR.items():
        judged = BESIDE_CHUNKS if dtype == torch.float32 else (goals, losses.LINEAR)
        # 50, 201, 316 and 403 GFLOP; 66, 262, 823 and 263 MB of float32 logits
        for shape, classes in (((1024, 512), 16000), ((2048, 512), 32000), ((4096, 256), 50257), ((512, 1024), 128256)):
            yield linear_cross_entropy(shape, classes, dtype, *judged)


def sigmoid_focal_indexed(shape: tuple[int, ...], speedup: float, memory: float | None = 1.05) -> Case:
    name = name_of("sigmoid_focal_indexed", shape, torch.float32)
    timed = cpu_timed(speedup, memory=memory)
    return Case(name, shape, torch.float32, class_or_background, losses.SIGMOID_FOCAL_INDEXED, timed)


# The least speed-up over eager for 4M elements of float32.
CPU_POINTWISE = {
    "huber": 2.0,
    "smooth_l1": 2.0,
    "mse": 2.0,
    "l1": 3.0,
    "bce": 4.0,
    "bce_with_logits": 4.0,
    "bce_with_logits_and_weights": 4.0,
    "sigmoid_focal": 12.0,
    "asymmetric": 12.0,
}
CPU_OF_MARGINS = {
    "margin_ranking": 8.0,
    "gaussian_nll": 8.0,
    "hinge_embedding": 15.0,
    "soft_margin": 6.0,
    "kl_div": 5.0,
    "kl_div_log_target": 5.0,
    "poisson_nll": 6.0,
    "poisson_nll_full": 10.0,
    "multilabel_soft_margin": 10.0,
}
LARGE = 1 << 22  # 50.3 MB of float32, 25.2 MB of bfloat16: input and target read, gradient written
SMALL = (64, 1, 1000, 10_000)  # 12 bytes to 120 kB
CALLS = "calls"


def pointwise(name: str, elements: int, dtype: torch.dtype, timed: dict[str, Timing], **options: Any) -> Case:
    *beside, target = (OF_THREE if name in OF_THREE else POINTWISE)[name][1:]
    return Case(
        name_of(name, (elements,), dtype),
        (elements,),
        dtype,
        target,
        losses.pointwise(name),
        timed,
        beside=beside[0] if beside else None,
        probabilities=name == "bce",
        **options,
    )


PSEUDO_HUBER = "delta * delta * (sqrt(1 + square((x - t) / delta)) - 1)"
LOG_COSH = "log(cosh(x - t))"


def eager_pseudo_huber(x: Tensor, t: Tensor) -> Tensor:
    return (torch.sqrt(1 + (x - t) ** 2) - 1).mean()


def eager_log_cosh(x: Tensor, t: Tensor) -> Tensor:
    return torch.log(torch.cosh(x - t)).mean()


def custom(name: str, value: str, params: dict[str, float], eager: Loss) -> Case:
    """A loss compiled at its first call must be as fast as the built-in Huber within a fifth."""

    @functools.cache
    def loss() -> Loss:
        return fusedloss.pointwise_loss(name, value, params=params)

    return Case(
        f"custom_{name}-fp32-{LARGE}",
        (LARGE,),
        torch.float32,
        values,
        {EAGER: eager, OURS: lambda x, t: loss()(x, t), "huber": L.huber_loss},
        cpu_timed(1 / 1.2, "huber"),
        different=("huber",),
    )


def cpu_pointwise() -> Iterator[Case]:
    for name, speedup in CPU_POINTWISE.items():
        yield pointwise(name, LARGE, torch.float32, cpu_timed(speedup, over_compile=1.2, memory=1.05))
    for name, speedup in CPU_OF_MARGINS.items():
        yield pointwise(name, LARGE, torch.float32, cpu_timed(speedup, over_compile=1.3, memory=1.05))


def cpu_pointwise_bf16() -> Iterator[Case]:
    for name in (*CPU_POINTWISE, *CPU_OF_MARGINS):
        yield pointwise(name, LARGE, torch.bfloat16, cpu_timed(2.0, over_compile=1.2, memory=1.05))


def cpu_small(quick: bool) -> Iterator[Case]:
    """Where the cost is that of a call. Huber has its sizes in a sweep."""
    for rows in (4, 32):  # 352 bytes and 2.8 kB
        yield cross_entropy((rows, 10), speedup=0.95, memory=None)
    yield sigmoid_focal_indexed((100, 8), speedup=1.0, memory=None)  # 7.2 kB
    for name in CPU_OF_ROWS:
        for small in ((4, 10), (64, 128)):
            yield of_rows(name, small, cpu_timed(0.95), compiled=False)
    for name in (*CPU_POINTWISE, *CPU_OF_MARGINS):
        for elements in SMALL if not quick and name != "huber" else SMALL[:1]:
            yield pointwise(name, elements, torch.float32, cpu_timed(0.95), compiled=False)


# The size of 4M elements that a loss of rows is measured at, and its least speed-up over eager there.
CPU_OF_ROWS = {
    "cosine_embedding": ((15625, 256), 5.0),
    "triplet_margin": ((15625, 256), 4.0),  # the gradient to the third operand is not asked for
    "multi_margin": ((4000, 1000), 2.0),
}


def of_rows(name: str, shape: tuple[int, ...], timed: dict[str, Timing], **options: Any) -> Case:
    _, beside, target = OF_ROWS[name]
    case = name_of(name, shape, torch.float32)
    return Case(case, shape, torch.float32, target, losses.of_rows(name), timed, beside=beside, **options)


# Beside each case its minimum traffic. A few hundred bytes are no measure of memory, so the smallest have no such goal.
def cpu_families(quick: bool) -> dict[str, Iterable[Case]]:
    """The cases of each table. Quick leaves out what takes seconds a call, and some of the small sizes."""
    return {
        "cross-entropy": [
            cross_entropy((512, 32000), speedup=2.5),  # 131 MB
            cross_entropy((257, 50257), speedup=2.5),  # 103 MB; odd rows, none but the first on a cache line
            cross_entropy((64, 128256), speedup=2.5),  # 65.7 MB
            cross_entropy((1, 128256), speedup=1.3),  # 1.0 MB; one row, cut into parts for two threads
            cross_entropy((2048, 1000), speedup=2.5),  # 16.4 MB
            # 17.6 MB; rows of five and a quarter vectors. 8 bytes of statistics a row beside 84 of logits: no goal for
            # memory.
            cross_entropy((100_000, 21), speedup=1.0, memory=None),
            cross_entropy((512, 32000), torch.bfloat16, speedup=2.0),  # 65.5 MB
            cross_entropy((257, 50257), torch.bfloat16, speedup=2.0),  # 51.7 MB
            cross_entropy((64, 128256), torch.bfloat16, speedup=2.0),  # 32.8 MB
            cross_entropy((2048, 1000), torch.bfloat16, speedup=2.0),  # 8.2 MB
        ],
        "cross-entropy, options": [
            smoothed_cross_entropy((2048, 1000), speedup=3.0),  # 16.4 MB
            row_weighted_cross_entropy((2048, 1000), speedup=2.5),  # 16.4 MB
            soft_cross_entropy((512, 32000), speedup=2.5),  # 197 MB
            focal((2048, 1000), speedup=4.0),  # 16.4 MB
        ],
        "pixels": [  # 46.1 MB; classes 256 kB apart
            cross_entropy((4, 21, 256, 256), speedup=3.0, memory=None),
            cross_entropy((4, 21, 256, 256), speedup=3.0, memory=None, channels_last=True),
            sigmoid_focal_indexed((4, 21, 256, 256), speedup=10.0, memory=None),
        ],
        "elements": [
            *cpu_pointwise(),
            sigmoid_focal_indexed((100_000, 80), speedup=15.0),  # 64.8 MB; a detector's anchors
            custom("pseudo_huber", PSEUDO_HUBER, {"delta": 1.0}, eager_pseudo_huber),
            custom("log_cosh", LOG_COSH, {}, eager_log_cosh),
        ],
        "elements, bf16": cpu_pointwise_bf16(),
        "rows": [of_rows(name, shape, cpu_timed(over, memory=1.05)) for name, (shape, over) in CPU_OF_ROWS.items()],
        "distillation": [
            distillation((4000, 1000), torch.float32),  # 48 MB
            distillation((4000, 1000), torch.bfloat16),  # 24 MB
            distillation((512, 32000), torch.float32),  # 197 MB
            distillation((512, 32000), torch.bfloat16),  # 98.3 MB
        ],
        "linear": cpu_linear(quick),
        CALLS: cpu_small(quick),
    }


def cpu_cases(quick: bool) -> Iterator[Case]:
    for family, cases in cpu_families(quick).items():
        yield from (replace(case, family=family) for case in cases)


VOCABULARIES = (10, 32, 100, 1000, 4096, 32000, 50257, 128256)
SIZES = (1, 10, 100, 1000, 10_000, 100_000)


def cpu_sweeps() -> Iterator[Case]:
    """How times depend on the classes of about 8M logits, and on the size of a call. Without torch.compile."""
    for dtype in (torch.float32, torch.bfloat16):
        for classes in VOCABULARIES:
            case = cross_entropy((8_000_000 // classes, classes), dtype)
            yield swept(case, "by vocabulary")
    for rows in SIZES:
        yield swept(cross_entropy((rows, 10)), "by size")
    for elements in (*SIZES, 1_000_000):
        yield swept(pointwise("huber", elements, torch.float32, cpu_timed(0)), "by size")


def swept(case: Case, family: str) -> Case:
    """No goal: the other families have them."""
    timed = {name: replace(timing, goals=[]) for name, timing in case.timed.items()}
    return replace(case, timed=timed, compiled=False, family=family)


# The least speed-up over eager, and the tensors that eager or its compilation holds.
CUDA_POINTWISE = {
    "huber": (2, 8),
    "sigmoid_focal": (20, 24),
    "smooth_l1": (2, 8),
    "mse": (2, 8),
    "l1": (2, 8),
    "bce": (2, 8),
    "bce_with_logits": (4, 16),
    "bce_with_logits_and_pos_weight": (4, 16),
}
QUICK = ("huber", "sigmoid_focal")

# A row's target and the statistics that forward saves for backward: at 10 classes in bfloat16 as much as a pass. For a
# mean's gradient in forward the targets are read once more.
OF_ROW = 8 + 8
# For rows of logits: one read; one read and one write; their sum; and both in one where the logits stay on the chip.
ROWS = {
    FORWARD: Timing(1, [Goal(COPY, 0.9)], row_bytes=OF_ROW),
    BACKWARD: Timing(2, [Goal(COPY, 0.9)], row_bytes=OF_ROW),
    BOTH: Timing(
        3,
        [
            Goal(COPY, 0.9),
            Goal(EAGER, 3),
            Goal("compile", 1.2),
            Goal("Liger", 1),
            Goal("QuACK", 1),
            Goal("flash-attn", 1),
        ],
        row_bytes=2 * OF_ROW,
    ),
    IN_FORWARD: Timing(2, [Goal(COPY, 0.85)], fused=losses.cross_entropy_in_forward, row_bytes=8 + OF_ROW),
}


def cuda_cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, timed: dict[str, Timing], peers: str = "") -> Case:
    name = name_of("cross_entropy", shape, dtype)
    return Case(name, shape, dtype, class_indices, losses.CROSS_ENTROPY, timed, device="cuda", peers=peers, tensors=7)


def cuda_pointwise(name: str, elements: int, dtype: torch.dtype, timed: dict[str, Timing]) -> Case:
    return pointwise(name, elements, dtype, timed, device="cuda", tensors=CUDA_POINTWISE[name][1])


CUDA_LINEAR = [((8192, 4096), 128256), ((8192, 4096), 32000), ((4096, 2048), 151936), ((16384, 2048), 50257)]
CUDA_LINEAR_GOALS = [Goal("products", 1 / 1.25), Goal("Liger", 1), Goal("QuACK", 1), Goal("CCE", 1)]


def cuda_linear(shape: tuple[int, ...], classes: int) -> Case:
    judged = CUDA_LINEAR_GOALS, losses.LINEAR_AND_CHUNKS
    return linear_cross_entropy(shape, classes, torch.bfloat16, *judged, device="cuda", peers="linear", tensors=8)


def cuda_cases(quick: bool) -> Iterator[Case]:
    """Quick leaves one or two of each kind."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    long = ((32768, 32000), (32768, 50257)) if quick else tuple((32768, c) for c in (1024, 4096, 32000, 50257))
    for dtype in dtypes:
        for shape in (*long, (8192, 128256)):  # a pass is 67 MB to 6.6 GB
            yield cuda_cross_entropy(shape, dtype, ROWS, peers="rows")
    images = {BOTH: Timing(3, [Goal(COPY, 0.8), Goal(EAGER, 4)], row_bytes=2 * OF_ROW)}
    yield cuda_cross_entropy((8, 21, 1024, 1024), torch.bfloat16, images)  # a pass is 352 MB
    for dtype in dtypes:
        for classes in (100,) if quick else (10, 32, 100, 1000):  # a pass is 20 MB to 4 GB
            both = {BOTH: Timing(3, [Goal(COPY, 0.75)], row_bytes=2 * OF_ROW)}
            yield cuda_cross_entropy((1_000_000, classes), dtype, both)
    for dtype in dtypes:
        for name in QUICK if quick else CUDA_POINTWISE:  # a pass is 0.5 or 1 GB
            goals = [Goal(COPY, 0.9), Goal(EAGER, CUDA_POINTWISE[name][0])]
            yield cuda_pointwise(name, 1 << 28, dtype, {BOTH: Timing(3, goals)})
    for (rows, features), classes in CUDA_LINEAR[:1] if quick else CUDA_LINEAR:  # 6.4 to 25.8 TFLOP
        yield cuda_linear((rows, features), classes)
    # The cost of a call. tests/gpu/test_gpu.py counts the launches.
    call = {CALL: Timing(0, [Goal(EAGER, 1)])}
    for rows in (4, 32):
        yield cuda_cross_entropy((rows, 10), torch.float32, call)
    name = name_of("focal", (32, 10), torch.float32)
    yield Case(name, (32, 10), torch.float32, class_indices, losses.FOCAL, call, device="cuda", tensors=8)
    for name in QUICK if quick else CUDA_POINTWISE:
        yield cuda_pointwise(name, 64, torch.float32, call)
