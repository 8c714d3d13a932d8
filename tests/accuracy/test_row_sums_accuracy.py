"""The losses of whole rows in random calls: never less accurate than torch's, against its float64."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from hypothesis import given
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from row_sums_calls import CALLS, double, of
from torch import Tensor

import fusedloss.functional as L

pytestmark = [needs_extension, on_cpu_alone("its slack is that of the CPU's sums: kernels/ bounds a GPU's error")]

# What the error may exceed torch's by, in rounding steps of the dtype at the largest number that the result comes
# from: a sum in lanes, two norms, a root and a quotient go either way. In half types ours is one rounding of a float32
# result, which torch's chain of them may beat by luck alone.
SLACK = {torch.float32: 12.0, torch.float64: 24.0, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass(frozen=True)
class Recipe:
    """A call in a few numbers, which are what a failure prints."""

    seed: int
    call: str
    dtype: torch.dtype
    rows: int
    columns: int
    log_scale: float
    alike: float  # how much the operands have in common
    reduction: str


def recipe(choices: Choices) -> Recipe:
    call = choices.of(list(CALLS))
    columns = choices.between(*choices.of([(1, 12), (1, 150), (500, 1100)]))
    return Recipe(
        choices.between(0, 2**20),
        call,
        choices.of([dtype for dtype in DTYPES if "margins" not in call or dtype not in HALVES]),
        choices.between(1, max(1, 3000 // columns)),
        columns,
        choices.between(-4, 4) / 2,
        choices.of([0.0, 0.5, 0.99]),
        choices.of(REDUCTIONS),
    )


def cooked(recipe: Recipe) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(recipe.seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    function, options = CALLS[recipe.call]
    common = normal(recipe.rows, recipe.columns)
    operands = [
        (10**recipe.log_scale * (recipe.alike * common + (1 - recipe.alike) * normal(recipe.rows, recipe.columns)))
        for _ in range({"cosine_embedding_loss": 2, "triplet_margin_loss": 3}.get(function, 1))
    ]
    # A margin that no loss meets, at which the slope jumps.
    margin = float(normal(1).abs() + 0.01) * (1 if "cosine" in recipe.call else 10**recipe.log_scale)
    given: dict[str, Any] = {**options, "margin": margin}
    if "cosine" in recipe.call:
        given["target"] = normal(recipe.rows).sign().to(recipe.dtype)
    if "margins" in recipe.call:
        given["target"] = torch.randint(recipe.columns, (recipe.rows,), generator=generator)
    if "weight" in recipe.call:
        given["weight"] = (normal(recipe.columns).abs() + 0.1).to(recipe.dtype)
    return [each.to(recipe.dtype) for each in operands], given


class Exact:
    """torch.nn.functional in float64, but for multi_margin_loss, which adds up the columns one by one."""

    cosine_embedding_loss = staticmethod(F.cosine_embedding_loss)
    triplet_margin_loss = staticmethod(F.triplet_margin_loss)

    @staticmethod
    def multi_margin_loss(
        x: Tensor,
        target: Tensor,
        p: int = 1,
        margin: float = 1.0,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        hinges = (margin - x.gather(1, target[:, None]) + x).clamp_min(0) ** p
        others = torch.arange(x.shape[1]) != target[:, None]
        losses = torch.where(others, hinges, 0.0).mean(1)
        losses = losses if weight is None else losses * weight[target]
        return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def results(functions: Any, recipe: Recipe, operands: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in operands]
    value = of(functions, recipe.call, given, reduction=recipe.reduction)(*leaves)
    if functions is L:
        assert value.grad_fn is not None and value.grad_fn.name().startswith("fusedloss::")
    upstream = torch.linspace(0.5, 1.5, max(1, value.numel()), dtype=torch.float64).view_as(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))]


def magnitudes(recipe: Recipe, operands: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest number that the value comes from, and those that the gradients come from."""
    largest = max(each.abs().max().item() for each in exact[1:])
    x = [each.double() for each in operands]
    if "cosine" in recipe.call:  # 1 - cos; x / norms times a cosine, all of which may cancel
        shortest = min(each.norm(dim=1).min().item() for each in x)
        losses, slope = 1.0, 1 / max(shortest, 1e-12)
    elif "triplet" in recipe.call:
        p = 1 if "norm 1" in recipe.call else 2
        losses = max((a - b).norm(p, dim=1).max().item() for a in x for b in x) + 10**recipe.log_scale
        slope = 1.0
    else:
        losses, slope = exact[0].abs().max().item(), largest
    scale = recipe.rows if recipe.reduction == "sum" else 1.0
    of_slope = slope / (recipe.rows if recipe.reduction == "mean" else 1.0)
    return [losses * scale, *[max(largest, of_slope)] * len(operands)]


def excess(got: Tensor, of_torch: Tensor, exact: Tensor, magnitude: float) -> float:
    """By what part of the slack the error of `got` exceeds that of torch."""
    assert got.shape == of_torch.shape == exact.shape and got.dtype == of_torch.dtype
    finite = of_torch.isfinite()  # in float16 torch's sums overflow before ours
    assert got[finite].isfinite().all()
    if not finite.any():
        return 0.0
    error, of_torch = ((each.double() - exact)[finite].abs().max() for each in (got, of_torch))
    step = torch.finfo(got.dtype).eps / 2 * magnitude + torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps
    least = of_torch.clamp_min(step) if got.dtype in HALVES else of_torch
    return ((error - least) / (SLACK[got.dtype] * step)).item()


@pytest.mark.examples
@given(one_draw(recipe))
def test_no_less_accurate_than_torch(recipe):
    operands, given = cooked(recipe)
    exact = results(Exact, recipe, [each.double() for each in operands], double(given))
    ours, torchs = (results(functions, recipe, operands, given) for functions in (L, F))
    limits = magnitudes(recipe, operands, exact)
    found = [excess(*each) for each in zip(ours, torchs, exact, limits, strict=True)]
    assert max(found) <= 1, found
    assert not any(math.isnan(each) for each in found)
