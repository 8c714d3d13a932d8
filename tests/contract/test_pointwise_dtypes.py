"""What comes of each pair of dtypes: the result's dtype, that of the gradients, and what torch refuses."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import no_less_exact, outcome, value_and_grads
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, not_under_a_default_device
from pointwise_calls import (
    BINARY,
    BROADCASTING,
    EVERY_DTYPE,
    EVERY_REDUCTION,
    FUNCTIONS,
    OF_DIFFERENCE,
    OF_TWO_DTYPES,
    WEIGHTED,
    data,
    elements,
    fused,
    random,
)
from torch import Tensor

import fusedloss.functional as L

# ---- dtypes

OTHERS = [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_of_result_and_gradients(function, dtype):
    def forward_and_backward(functions: Any, x: Tensor, t: Tensor, reduction: str) -> list[Any]:
        run = lambda: getattr(functions, function)(x, t, reduction=reduction)  # noqa: E731
        leaves = [each for each in (x, t) if each.is_floating_point()]
        forward = outcome(run)
        for each in leaves:
            each.requires_grad_()
        try:
            value = run()
            backward = [value.dtype, *(grad.dtype for grad in torch.autograd.grad(value.sum(), leaves))]
        except Exception as error:
            backward = [type(error), str(error)]
        return [forward, *backward]

    for other, reduction in itertools.product(OTHERS, REDUCTIONS):
        ours, torchs = (
            forward_and_backward(functions, *data(function, (4, 3), dtype, other), reduction) for functions in (L, F)
        )
        if function == "mse_loss" and function not in OF_TWO_DTYPES and dtype != other:
            ours, torchs = ours[:1], torchs[:1]
        assert ours == torchs, (other, reduction)


def test_which_backwards_take_two_dtypes():
    expected = ["mse_loss"] * (torch.__version__ >= "2.13") + ["l1_loss", "smooth_l1_loss"]
    assert [function for function in OF_TWO_DTYPES if function != "mse_loss" or "mse_loss" in expected] == expected


@needs_extension
@EVERY_DTYPE
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_that_run_fused(function, dtype):
    # A result of the input's dtype, or of float32 beside a half-precision one.
    for other in OTHERS:
        result = torch.promote_types(dtype, other)
        if function in ("huber_loss", "binary_cross_entropy"):
            expected = other == dtype
        elif function in OF_DIFFERENCE:
            takes = other in (*DTYPES, torch.int64, torch.int32, torch.uint8)
            expected = takes and (result == dtype or (dtype in HALVES and result == torch.float32))
        else:
            expected = other == dtype or (dtype in HALVES and other == torch.float32)
        assert fused(function, *data(function, (4, 3), dtype, other)) == expected, other


@EVERY_DTYPE
@pytest.mark.parametrize("function", [*WEIGHTED, *BINARY])
@not_under_a_default_device
def test_dtypes_beside_a_weight(function, dtype):
    for other, of_weight, reduction in itertools.product(DTYPES, [*DTYPES, torch.int64], REDUCTIONS):
        x, t = data(function, (4, 3), dtype, other)
        weight = elements((4, 3), of_weight)
        run = lambda f: getattr(f, function)(x, t, weight=weight, reduction=reduction)  # noqa: B023, E731
        assert outcome(lambda: run(L)) == outcome(lambda: run(F)), (other, of_weight, reduction)  # noqa: B023


@EVERY_DTYPE
def test_dtypes_beside_a_pos_weight(dtype):
    x, t = data(BINARY[1], (4, 3), dtype)
    for of_weight, reduction in itertools.product([*DTYPES, torch.int64], REDUCTIONS):
        weight = elements((3,), of_weight)
        run = lambda f: getattr(f, BINARY[1])(x, t, pos_weight=weight, reduction=reduction)  # noqa: B023, E731
        assert outcome(lambda: run(L)) == outcome(lambda: run(F)), (of_weight, reduction)  # noqa: B023


@EVERY_REDUCTION
@pytest.mark.parametrize("function", WEIGHTED)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_dtypes_beside_a_weight_without_dimensions(function, reduction):
    # Beside a target with some, it does not take part in torch's promotion: the losses stay half, their mean does not.
    x, t = data(function, (3,), torch.float16)
    run = lambda f: getattr(f, function)(x[0], t, weight=torch.tensor(0.3), reduction=reduction)  # noqa: E731
    assert outcome(lambda: run(L)) == outcome(lambda: run(F))


@pytest.mark.parametrize("other", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@EVERY_DTYPE
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss"])
def test_integer_targets(function, dtype, other):
    x, t = (3 * random(4, 5)).to(dtype), (random(4, 5, seed=2).abs() * 3).to(other)
    for target in (t, t[:, :1].expand(4, 5)):
        for reduction in REDUCTIONS:
            run = lambda f, x, t: getattr(f, function)(x, t, reduction=reduction)  # noqa: B023, E731
            got = value_and_grads(lambda x: run(L, x, target), x)  # noqa: B023
            no_less_exact(got, value_and_grads(lambda x: run(F, x, target.double()), x.double()), dtype)  # noqa: B023
            assert got[0].dtype == run(F, x, target).dtype == dtype


def test_two_integers():
    x, t = torch.tensor([1, -2, 3]), torch.tensor([2, 2, 2])
    assert torch.equal(L.l1_loss(x, t, reduction="none"), torch.tensor([1, 4, 1]))
    for function in FUNCTIONS:
        for reduction in REDUCTIONS:
            run = lambda f: getattr(f, function)(x, t, reduction=reduction)  # noqa: B023, E731
            assert outcome(lambda: run(L)) == outcome(lambda: run(F))  # noqa: B023
