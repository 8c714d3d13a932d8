"""Gradients of operands that broadcast, which are sums: those of half types are summed before they are rounded."""

import pytest
import torch
import torch.nn.functional as F
from losses import HALVES, REDUCTIONS
from marks import needs_extension

import fusedloss.functional as L

pytestmark = [
    needs_extension,
    pytest.mark.filterwarnings("ignore:Using a target size"),
    pytest.mark.filterwarnings("ignore:reduction"),
]

ROWS, COLUMNS = 100, 32
# Which operands there are, and their options: signs are 1 and -1, positive operands lie between 1/2 and 3/2.
CALLS = {
    "mse": ("mse_loss", "nn", {}),
    "l1": ("l1_loss", "nn", {}),
    "smooth l1": ("smooth_l1_loss", "nn", {"beta": 0.5}),
    "huber": ("huber_loss", "nn", {"delta": 0.5}),
    "kl": ("kl_div", "np", {}),
    "kl, log target": ("kl_div", "nn", {"log_target": True}),
    "poisson": ("poisson_nll_loss", "np", {"full": True}),
    "poisson, rate": ("poisson_nll_loss", "pp", {"log_input": False}),
    "hinge": ("hinge_embedding_loss", "ns", {}),
    "margin ranking": ("margin_ranking_loss", "nns", {"margin": 0.5}),
    "gaussian": ("gaussian_nll_loss", "nnp", {}),
}
OF_TWO = ("mse", "l1", "smooth l1", "huber", "margin ranking", "gaussian")  # with a gradient to the target, fused
MADE = {
    "n": lambda x: x,
    "s": lambda x: torch.where(x < 0, -1.0, 1.0),
    "p": lambda x: x.sigmoid() + 0.5,
}


def operands_of(kinds, shapes, dtype):
    """All rows are one, so that all their gradients would be rounded the same way."""
    generator = torch.Generator().manual_seed(0)
    return [
        MADE[kind](torch.randn(columns, generator=generator)).to(dtype).repeat(rows, 1)
        for kind, (rows, columns) in zip(kinds, shapes, strict=True)
    ]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_a_sum_of_gradients_is_rounded_once(call, reduction, dtype):
    rounded_once(call, reduction, dtype, lambda loss: loss)


@pytest.mark.parametrize("call", ["poisson", "kl, log target", "gaussian"])
def test_a_compiled_sum_of_gradients_is_rounded_once(call):
    """Of so many elements that torch.compile keeps the op."""
    compiled = lambda loss: torch.compile(loss, backend="aot_eager", fullgraph=True)  # noqa: E731
    rounded_once(call, "none", torch.bfloat16, compiled, rows=5, columns=20_000)


def rounded_once(call, reduction, dtype, prepared, rows=ROWS, columns=COLUMNS):
    function, kinds, options = CALLS[call]
    ours = prepared(lambda *operands: getattr(L, function)(*operands, **options, reduction=reduction))
    exactly = lambda *operands: getattr(F, function)(*operands, **options, reduction=reduction)  # noqa: E731
    for broadcast in range(len(kinds)):
        shapes = [(1 if each == broadcast else rows, columns) for each in range(len(kinds))]
        if call == "gaussian" and broadcast != 1:  # torch's variance has the input's size
            shapes = [(1, columns), (rows, columns), (1, columns)]
        operands = operands_of(kinds, shapes, dtype)
        differentiable = [kind != "s" and (place != 1 or call in OF_TWO) for place, kind in enumerate(kinds)]
        exact, got = (
            [each.clone().requires_grad_(takes) for each, takes in zip(given, differentiable, strict=True)]
            for given in ([each.double() for each in operands], operands)
        )
        wanted = [place for place, each in enumerate(got) if each.requires_grad and shapes[place][0] == 1]
        if not wanted:
            continue
        expected, grads = (
            torch.autograd.grad(
                value := loss(*given),
                [given[place] for place in wanted],
                torch.full_like(value, 179 / 256),  # a number of each dtype
            )
            for loss, given in ((exactly, exact), (ours, got))
        )
        for grad, of_double in zip(grads, expected, strict=True):
            bound = (0.51 * torch.finfo(dtype).eps) * of_double.abs() + 1e-6
            assert grad.dtype == dtype
            assert ((grad.double() - of_double).abs() <= bound).all()


def test_opposite_numbers_beyond_float16_cancel():
    x = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    target = torch.tensor([6e4, -6e4], dtype=torch.float16)
    (grad,) = torch.autograd.grad(L.mse_loss(x, target, reduction="sum"), x)  # of terms -1.2e5 and 1.2e5
    assert grad.item() == 0.0
