"""A weight beside inputs of any dtypes, also those that only torch's single steps take: complex, integers, bool."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from compare import same, warned
from losses import HALVES, REDUCTIONS
from marks import on_cpu_alone
from torch import Tensor

import fusedloss.functional as L

DTYPES = [torch.float32, torch.bfloat16, torch.complex64, torch.uint8, torch.int64, torch.bool]
SHAPES = [((3, 4), (3, 4)), ((1, 4), (1, 1, 4)), ((3, 1), (3,))]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small integers, which no dtype rounds."""
    made = torch.randint(0, 5, shape)
    return torch.complex(made.float(), made.flip(0).float()).to(dtype) if dtype.is_complex else made.to(dtype)


def operands() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    for (shape, other), (x, t, w) in itertools.product(SHAPES, itertools.product(DTYPES, repeat=3)):
        yield numbers(shape, x), numbers(other, t), numbers(shape, w)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "huber_loss"])
@on_cpu_alone("the errors name the device's kernels")
def test_results_warnings_and_errors_are_torchs(function, reduction, autocast):
    for x, t, weight in operands():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run = lambda module: warned(lambda: getattr(module, function)(x, t, reduction=reduction, weight=weight))  # noqa: B023, E731
            (got, caught), (expected, torchs) = run(L), run(F)
        if isinstance(expected, Tensor):
            assert got.dtype == expected.dtype, (x.dtype, t.dtype, weight.dtype)
            same(got, expected, rtol=1e-2, atol=1e-6)
        else:
            assert got == expected
        assert [warning[1] for warning in caught] == [warning[1] for warning in torchs]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wide_weight_without_dimensions_gives_way(function, reduction, dtype):
    """Also where the other operands' result is float32."""
    x, weight = torch.tensor(1.5, dtype=dtype), torch.tensor(0.75, dtype=torch.float64)
    for other in (torch.float32, dtype):
        t = torch.arange(5).to(other)
        (got, _), (expected, _) = (
            warned(lambda: getattr(module, function)(x, t, reduction=reduction, weight=weight))  # noqa: B023
            for module in (L, F)
        )
        assert got.dtype == expected.dtype
        same(got, expected)
