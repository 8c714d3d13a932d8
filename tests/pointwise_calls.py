"""The calls that the tests of the pointwise contract run over, and how they are compared with torch's."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, REDUCTIONS, on_cpu_alone
from torch import Tensor

import fusedloss
import fusedloss.functional as L

BROADCASTING = "Using a target size"  # torch warns of it, and so do we
HALVES = [torch.bfloat16, torch.float16]
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


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return made.to(torch.get_default_device())


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


def upstream_of(value: Tensor) -> Tensor:
    """Random, never ones, and exact in every dtype."""
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = torch.randint(5, 12, value.shape, generator=generator, device="cpu") / 8
    return drawn.to(value.device, value.dtype)


def value_and_grads(run: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> list[Tensor]:
    """The value, and the gradients of the tensors."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    value = run(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))]


def same(got: Any, expected: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


def no_less_exact(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Than one rounding of a half type, or a few of a wider one."""
    eps = torch.finfo(dtype).eps
    for one, other in zip(got, exact, strict=True):
        scale = other.abs().nan_to_num(0, 0, 0).max().item() if other.numel() else 0.0
        steps = 1 if dtype in HALVES else 32
        same(one.double(), other, rtol=steps * eps, atol=steps * eps * scale / 16)


def warned(run: Callable[[], Any]) -> tuple[Any, list[tuple[type, str, str]]]:
    """What it returns or raises, as text; and what it warns of, with the file that is blamed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = run()
        except Exception as error:
            result = (type(error), str(error))
    return result, [(warning.category, str(warning.message), warning.filename) for warning in caught]


def outcome(run: Callable[[], Tensor]) -> Any:
    """A dtype, or an error with its text."""
    result, _ = warned(run)
    return result.dtype if isinstance(result, Tensor) else result


def fused(function: str, *tensors: Tensor, **options: Any) -> bool:
    return fusedloss.explain(getattr(L, function), *tensors, **options).startswith("fused")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}

PAIRS = [((3, 1), (3,)), ((2, 3), (3,)), ((3,), (2, 3)), ((), (4,)), ((4,), ()), ((2, 1, 4), (3, 1)), ((1,), (5, 6))]

RAISES = on_cpu_alone("on a GPU torch's device assert ends the process, and the loss of ours is NaN")
