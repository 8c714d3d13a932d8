"""How results are made and compared: values, gradients, errors, warnings."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from losses import DTYPES, HALVES
from torch import Tensor

EPSILON = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}  # one rounding, relative to the number


def class_dim(x: Tensor) -> int:
    return min(x.dim() - 1, 1)


# ---- upstream gradients: random, never ones


def upstreams(*results: Tensor) -> list[Tensor]:
    """Exact in every dtype."""
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = [torch.randint(5, 12, each.shape, generator=generator, device="cpu") / 8 for each in results]
    return [upstream.to(each.device, each.dtype) for upstream, each in zip(drawn, results, strict=True)]


def upstream_of(value: Tensor) -> Tensor:
    return upstreams(value)[0]


def value_and_grad(
    function: Callable[..., Tensor], input: Tensor, target: Tensor, reduction: str, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and the upstream gradient used."""
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(x, target, reduction)
    if upstream is None:
        generator = torch.Generator("cpu").manual_seed(7)
        upstream = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    upstream = upstream.to(value.device, value.dtype)
    (grad,) = torch.autograd.grad(value, x, upstream)
    return value.detach(), grad, upstream


def value_and_grads(run: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> list[Tensor]:
    """The value, and the gradients of the tensors."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    value = run(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))]


# ---- autocast


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


# ---- errors


def error(got: Tensor, exact: Tensor) -> float:
    """The largest, relative to the largest number."""
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def largest_error(got: Tensor, exact: Tensor) -> float:
    """As error(), where results may be empty, all zero, or beyond the dtype's range, and are infinite there alone."""
    assert got.shape == exact.shape
    overflows = exact.abs() > torch.finfo(got.dtype).max  # in float16, only where the true result does
    assert torch.equal(got.isinf(), overflows)
    got, exact = got[~overflows], exact[~overflows]
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().clamp_min(torch.finfo(got.dtype).tiny)
    return ((got.double() - exact).abs().max() / scale).item()


def assert_close(got: Tensor, exact: Tensor, steps: float) -> None:
    """Within so many roundings at the largest number, or one at the smallest that the dtype has."""
    limits = torch.finfo(got.dtype)
    assert got.shape == exact.shape
    bound = steps * limits.eps / 2 * exact.abs().max() + limits.tiny * limits.eps / 2
    assert (got.double() - exact).abs().max() <= bound


def same(got: Any, expected: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


def no_less_exact(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Than one rounding of a half type, or a few of a wider one."""
    eps = torch.finfo(dtype).eps
    for one, other in zip(got, exact, strict=True):
        scale = other.abs().nan_to_num(0, 0, 0).max().item() if other.numel() else 0.0
        steps = 1 if dtype in HALVES else 32
        same(one.double(), other, rtol=steps * eps, atol=steps * eps * scale / 16)


def places(numbers: Tensor) -> Tensor:
    """Which numbers are NaN, infinite or minus infinite."""
    return numbers.isnan() * 3 + numbers.isposinf() * 2 + numbers.isneginf() * 1


# ---- what is raised and warned of


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
