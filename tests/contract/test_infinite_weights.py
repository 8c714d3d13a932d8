"""Class weights that are no finite numbers give what torch gives."""

import pytest
import torch
import torch.nn.functional as F
from compare import places, value_and_grad
from losses import DTYPES, REDUCTIONS
from torch import Tensor

import fusedloss
import fusedloss.functional as L

INFINITE = [torch.inf, -torch.inf]
# Rows of one block and of several, columns of one block and of several, and a single row.
SHAPES = [(6, 5), (3, 5000), (2, 5, 7), (2, 700, 70), (5,)]


def data(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    dim = min(len(shape) - 1, 1)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if kind == "probabilities":
        return x, torch.randn(shape, dtype=torch.float64).softmax(dim).to(dtype)
    return x, torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])


@pytest.mark.thinned
@pytest.mark.parametrize("weight", [*INFINITE, torch.nan])
@pytest.mark.parametrize("kind, smoothing", [("probabilities", 0.0), ("probabilities", 0.1), ("indices", 0.1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_infinite_where_torchs_are(shape, dtype, reduction, kind, smoothing, weight):
    x, target = data(shape, dtype, kind)
    weights = torch.ones(shape[min(len(shape) - 1, 1)], dtype=dtype)
    weights[2] = weight
    assert fusedloss._library.extension is None or fusedloss.explain(
        L.cross_entropy, x, target, weights, label_smoothing=smoothing
    ).startswith("fused")

    def run(function):
        return lambda x, target, reduction: function(x, target, weights, reduction=reduction, label_smoothing=smoothing)

    got, grad, upstream = value_and_grad(run(L.cross_entropy), x, target, reduction)
    expected, expected_grad, _ = value_and_grad(run(F.cross_entropy), x, target, reduction, upstream)
    assert torch.equal(places(got), places(expected))
    assert torch.equal(places(grad), places(expected_grad))


@pytest.mark.parametrize("weight", INFINITE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_the_targets_logit_is_the_limit(shape, weight):
    """torch's is NaN, an infinity less another."""
    x, target = data(shape, torch.float32, "indices")
    target[...] = 2
    dim = min(len(shape) - 1, 1)
    weights = torch.ones(shape[dim])
    weights[2] = weight
    value, grad, _ = value_and_grad(
        lambda x, target, r: L.cross_entropy(x, target, weights, reduction=r), x, target, "sum", torch.tensor(1.0)
    )
    assert value == weight
    expected = torch.full_like(x, weight)
    expected.select(dim, 2).fill_(-weight)
    assert torch.equal(grad, expected)
