"""The calls that the tests of the pointwise contract run over."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import same, warned
from drawn import random as random
from losses import DTYPES, HALVES, REDUCTIONS
from marks import on_cpu_alone
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as L

BROADCASTING = "Using a target size"  # torch warns of it, and so do we
OF_DIFFERENCE = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"]
WEIGHTED = ["mse_loss", "l1_loss", "huber_loss"]
BINARY = ["binary_cross_entropy", "binary_cross_entropy_with_logits"]
FUNCTIONS = OF_DIFFERENCE + BINARY


def _differentiates_two_dtypes(function: str) -> bool:
    x, t = torch.ones(1, requires_grad=True, device="cpu"), torch.ones(1, dtype=torch.float64, device="cpu")
    try:
        getattr(F, function)(x, t).backward()
    except RuntimeError:
        return False
    return True


# Of torch's losses those with a backward for operands of two dtypes: not huber_loss, and in torch 2.11 not mse_loss.
OF_TWO_DTYPES = [function for function in OF_DIFFERENCE if _differentiates_two_dtypes(function)]
MODULES = {
    "mse_loss": "MSELoss",
    "l1_loss": "L1Loss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
}


def data(function: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype | None = None) -> list[Tensor]:
    """An input and a target, of another dtype where one is given."""
    x, t = 2 * random(*shape, seed=1), random(*shape, seed=2)
    x = x.sigmoid() if function == "binary_cross_entropy" else x
    t = t.sigmoid() if function in BINARY else t
    return [x.to(dtype), t.to(dtype if other is None else other)]


# What a call is given beside input and target, from their shape: the losses with all that their kernels take.
Options = Callable[[tuple[int, ...], torch.dtype], dict[str, Any]]


def elements(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 3) -> Tensor:
    return (random(*shape, seed=seed).abs() + 0.1).to(dtype)


def of_classes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 4) -> Tensor:
    """Of the second dimension, as a pos_weight of (N, C, H, W) is."""
    return elements((shape[1], *[1] * len(shape[2:])) if len(shape) > 1 else shape, dtype, seed)


CALLS: dict[str, tuple[str, Options]] = {
    "mse": ("mse_loss", lambda shape, dtype: {}),
    "mse, weight": ("mse_loss", lambda shape, dtype: {"weight": elements(shape, dtype)}),
    "l1": ("l1_loss", lambda shape, dtype: {}),
    "l1, weight": ("l1_loss", lambda shape, dtype: {"weight": elements(shape, dtype)}),
    "smooth l1": ("smooth_l1_loss", lambda shape, dtype: {"beta": 0.7}),
    "huber": ("huber_loss", lambda shape, dtype: {"delta": 0.7}),
    "huber, weight": ("huber_loss", lambda shape, dtype: {"delta": 0.7, "weight": elements(shape, dtype)}),
    "bce": ("binary_cross_entropy", lambda shape, dtype: {}),
    "bce, weight": ("binary_cross_entropy", lambda shape, dtype: {"weight": elements(shape[-1:], dtype)}),
    "logits": ("binary_cross_entropy_with_logits", lambda shape, dtype: {}),
    "logits, weight": (
        "binary_cross_entropy_with_logits",
        lambda shape, dtype: {"weight": elements(shape[-1:], dtype)},
    ),
    "logits, pos_weight": (
        "binary_cross_entropy_with_logits",
        lambda shape, dtype: {"pos_weight": of_classes(shape, dtype)},
    ),
    "logits, both": (
        "binary_cross_entropy_with_logits",
        lambda shape, dtype: {"weight": elements(shape, dtype), "pos_weight": of_classes(shape, dtype)},
    ),
    "focal": ("sigmoid_focal_loss", lambda shape, dtype: {"alpha": 0.3, "gamma": 1.5}),
    "focal, weight": (
        "sigmoid_focal_loss",
        lambda shape, dtype: {"gamma": 2.0, "weight": elements(shape[-1:], dtype)},
    ),
}
ALL = pytest.mark.parametrize("call", CALLS)
OF_TORCH = [call for call in CALLS if "focal" not in call]
TORCHS = pytest.mark.parametrize("call", OF_TORCH)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_HALF = pytest.mark.parametrize("dtype", HALVES, ids=str)


def made(
    call: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype | None = None
) -> tuple[str, list[Tensor], dict[str, Any]]:
    function, options = CALLS[call]
    return function, data(function if "focal" not in call else BINARY[1], shape, dtype, other), options(shape, dtype)


def of_torch(function: str) -> Callable[..., Tensor]:
    """The function that ours stands for; of the focal loss, which torch lacks, its formula."""
    if function != "sigmoid_focal_loss":
        return getattr(F, function)

    def focal(x, t, alpha=0.25, gamma=2.0, reduction="none", weight=None):
        return fusedloss._route.LOSSES["sigmoid_focal"].native(x, t, weight, reduction, alpha, gamma)

    return focal


def as_double(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}


def fused(function: str, *tensors: Tensor, **options: Any) -> bool:
    return fusedloss.explain(getattr(L, function), *tensors, **options).startswith("fused")


# Of (N, C, H, W); the last one has other numbers.
IMAGE_LAYOUTS = [
    "contiguous", "channels_last", "inner transposed", "sliced", "every other column", "expanded columns",
]  # fmt: skip

# Sizes of an input and a target that broadcast.
PAIRS = [((3, 1), (3,)), ((2, 3), (3,)), ((3,), (2, 3)), ((), (4,)), ((4,), ()), ((2, 1, 4), (3, 1)), ((1,), (5, 6))]

RAISES = on_cpu_alone("on a GPU torch's device assert ends the process, and the loss of ours is NaN")

# Under autocast: torch takes no probabilities there.
AUTOCAST = [pytest.param(call, marks=on_cpu_alone("torch refuses it")) if "bce" in call else call for call in OF_TORCH]
# Beside a weight autocast takes torch's mse and l1 step by step, and so do ours, natively.
FUSED_UNDER_AUTOCAST = [call for call in AUTOCAST if call not in ("mse, weight", "l1, weight")]


def assert_reduction_as_in_torch(
    function: str, module: str, tensors: list[Tensor], options: dict[str, Any], reduction: Any
) -> None:
    """The value, or the error, and the warnings; no constructor looks at a reduction."""
    results = []
    for functions, modules in ((L, fusedloss), (F, nn)):
        run = partial(getattr(functions, function), *tensors, **options, reduction=reduction)
        value, caught = warned(run)
        results.append((value, [warning[:2] for warning in caught]))
        getattr(modules, module)(reduction=reduction)
    if isinstance(results[1][0], Tensor):
        same(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
    else:
        assert results[0] == results[1]
