"""Cross-entropy of random calls: never less accurate than torch's, and NaN or infinite only where torch's is.

The exact result is a float64 formula that adds up the exponentials without the largest, as torch's does not: torch's
own float64 loss of a confident row has no digits left to compare with.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from compare import places
from hypothesis import given
from layouts import laid_out
from losses import DTYPES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss.functional as L

pytestmark = [needs_extension, on_cpu_alone("its slack is that of the CPU's sums: test_values.py bounds a GPU's error")]

# What the error may exceed torch's by, in rounding steps (half the distance of two numbers) of the dtype at the largest
# magnitude. In half types both round one float32 result once, and what is left is which way a tie falls. In float32 a
# result is the end of some five roundings (gap, exponential, sum, logarithm, product) that go either way, and its sum
# is that of up to 3000 / 32 additions in a lane, whose errors grow as their root: sqrt(94) / 2. In float64 the exact
# formula has as many of its own.
SLACK = {torch.float32: 6.0, torch.float64: 12.0, torch.bfloat16: 0.01, torch.float16: 0.01}
FUSED = ("fusedloss::CrossEntropyBackward", "fusedloss::SoftCrossEntropyBackward")
LAYOUTS = ["contiguous", "transposed", "sliced", "channels_last", "expanded"]
LARGEST = 6000  # logits: enough for a block of classes, and little enough for thousands of calls


@dataclass(frozen=True)
class Recipe:
    """A call in a few numbers, which are what a failure prints."""

    seed: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    target: str  # int64, uint8, probabilities, or float32 probabilities
    one_hot: bool
    ignored: float
    weight: str  # none, random, or half of them zero
    smoothing: float
    reduction: str
    log_scale: float
    gap: int
    masked: float


def shape(choices: Choices) -> tuple[int, ...]:
    dims = choices.between(1, 4)
    classes = choices.between(*choices.of([(1, 12), (1, 150), (1, 3000), (1000, 3000)]))
    if dims == 1:
        return (classes,)
    room = max(1, LARGEST // classes)
    batch = choices.between(1, min(room, 40))
    inner = [choices.between(1, max(1, min(room // batch, 9))) for _ in range(dims - 2)]
    return (batch, classes, *inner)


def recipe(choices: Choices) -> Recipe:
    of = choices.of
    return Recipe(
        shape=shape(choices),
        dtype=of(DTYPES),
        layout=of(LAYOUTS),
        target=of(["int64", "uint8", "probabilities", "float32 probabilities"]),
        one_hot=of([False, True]),
        ignored=of([0.0, 0.0, 0.2, 0.9, 1.0]),
        weight=of(["none", "random", "half of them zero"]),
        smoothing=of([0.0, 0.0, 0.1, 0.3, 1.0]),
        reduction=of(REDUCTIONS),
        log_scale=choices.between(-30, 40) / 10,
        gap=of([0, choices.between(10, 80)]),
        masked=of([0.0, 0.0, 0.1, 0.5, 1.0]),
        seed=choices.between(0, 2**40),
    )


@dataclass(frozen=True)
class Call:
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    smoothing: float
    reduction: str
    upstream: Tensor

    @property
    def dim(self) -> int:
        return min(self.logits.dim() - 1, 1)

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()


def cooked(recipe: Recipe) -> Call:
    generator = torch.Generator().manual_seed(recipe.seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    shape, dtype = recipe.shape, recipe.dtype
    dim = min(len(shape) - 1, 1)
    classes, rows = shape[dim], shape[:dim] + shape[dim + 1 :]
    # One row of the batch stands for all of them where it is expanded.
    made = (1, *shape[1:]) if recipe.layout == "expanded" and dim else shape
    index = torch.randint(classes, made[:dim] + made[dim + 1 :], generator=generator)
    of_target = torch.zeros(made, dtype=torch.bool).scatter(dim, index.unsqueeze(dim), True)
    x = 10**recipe.log_scale * normal(*made)
    x = x + recipe.gap * (of_target & (uniform(*made) < 0.7))
    largest = torch.finfo(dtype).max
    x = x.clamp(-largest, largest).masked_fill((uniform(*made) < recipe.masked) & ~of_target, -math.inf)
    logits = (x.to(dtype) if recipe.layout == "expanded" else laid_out(x.to(dtype), recipe.layout)).expand(shape)

    wide = dtype if dtype == torch.float64 else torch.float32
    weight = uniform(classes).to(dtype) if recipe.weight != "none" else None
    if weight is not None and recipe.weight != "random":
        weight = weight * (uniform(classes) < 0.5)
    ignore_index = -100
    if "probabilities" in recipe.target:
        scores = (3 * normal(*made)).masked_fill(x == -math.inf, -math.inf)
        target = of_target.double() if recipe.one_hot else scores.softmax(dim)
        target = target.to(wide if "float32" in recipe.target else dtype).expand(shape)
    else:
        bytes_fit = recipe.target == "uint8" and classes < 255
        ignore_index = 255 if bytes_fit else ignore_index
        target = index.expand(rows).masked_fill(uniform(*rows) < recipe.ignored, ignore_index)
        target = target.to(torch.uint8) if bytes_fit else target
    upstream = uniform(*(rows if recipe.reduction == "none" else ())) + 0.5
    return Call(logits, target, weight, ignore_index, recipe.smoothing, recipe.reduction, upstream)


@dataclass(frozen=True)
class Exact:
    value: Tensor
    grad: Tensor
    magnitude: Tensor  # the largest of the values and of what they are sums of
    slope: Tensor  # the largest of what the gradient is a difference of
    divisor: Tensor
    adds_masked: bool  # a class that counts nothing, and whose logit is -infinity: 0 times infinity in torch


def exact(call: Call, upstream: Tensor) -> Exact:
    x, dim = call.logits.detach().double(), call.dim
    classes = x.shape[dim]
    ones = torch.ones(classes, dtype=torch.float64)
    weight = (ones if call.weight is None else call.weight.double()).view(-1, *[1] * (x.dim() - 1 - dim)).expand_as(x)
    if call.soft:
        kept = torch.ones_like(x.select(dim, 0), dtype=torch.bool)
        index = x.argmax(dim, keepdim=True)
        factors = weight * (call.target.double() * (1 - call.smoothing) + call.smoothing / classes)
        divisor = kept.double().sum()
    else:
        kept = call.target != call.ignore_index
        index = torch.where(kept, call.target.long(), 0).unsqueeze(dim)
        of_target = weight.gather(dim, index)
        own = torch.zeros_like(x).scatter(dim, index, (1 - call.smoothing) * of_target)
        factors = (own + call.smoothing / classes * weight) * kept.unsqueeze(dim)
        divisor = (of_target.squeeze(dim) * kept).sum()
    # Relative to the largest logit, which is left out of the sum: log1p then keeps the digits of a confident row.
    largest = x.amax(dim, keepdim=True)
    exponential = (x - largest).exp()
    rest = exponential.scatter(dim, x.argmax(dim, keepdim=True), 0.0).sum(dim, keepdim=True)
    log_total, total = rest.log1p(), 1 + rest
    terms = torch.where(factors == 0, 0.0, factors * (largest - x + log_total))
    losses, mass = terms.sum(dim), factors.sum(dim, keepdim=True)
    grad = exponential / total * mass - factors
    if not call.soft and not call.smoothing:
        # p - 1 of the target is the sum of all other p.
        others = exponential.scatter(dim, index, 0.0).sum(dim, keepdim=True)
        grad = grad.scatter(dim, index, -others / total * mass)
    # With probabilities the log of the sum is added to every class, the confident one too, as in torch: a rounding of 1
    # stays in it. With an index it is added to the target's alone, and keeps its digits.
    magnitudes = torch.maximum(losses, mass.squeeze(dim)) if call.soft else losses
    of_row = upstream.double()
    if call.reduction == "none":
        of_row = of_row.unsqueeze(dim)
    else:
        divided = divisor if call.reduction == "mean" else torch.ones_like(divisor)
        losses, magnitudes, of_row = losses.sum() / divided, magnitudes.sum() / divided, of_row / divided
    counts = kept.unsqueeze(dim)
    return Exact(
        losses,
        torch.where(counts, grad * of_row, 0.0),
        magnitudes.nan_to_num(0, 0, 0).max(),
        torch.where(counts, mass * of_row, 0.0).nan_to_num(0, 0, 0).max(),
        divisor,
        bool(((factors == 0) & (x == -math.inf)).any()) and (call.soft or call.smoothing > 0),
    )


def excess(got: Tensor, of_torch: Tensor, exact: Tensor, magnitude: Tensor, excused: bool) -> float:
    """By what part of the slack the error of `got` exceeds that of torch."""
    assert got.shape == of_torch.shape == exact.shape and got.dtype == of_torch.dtype
    assert torch.equal(got.isfinite(), exact.to(got.dtype).isfinite())
    same = places(got) == places(of_torch)
    assert (same | ~of_torch.isfinite()).all()
    assert excused or same.all()
    finite = got.isfinite()
    if not finite.any():
        return 0.0
    tiny = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).tiny
    step = torch.finfo(got.dtype).eps / 2 * magnitude.clamp_min(tiny)
    error = (got.double() - exact).abs()[finite].max()
    # Where torch's is NaN, one rounding is the error to compare with.
    error_of_torch = torch.where(same, (of_torch.double() - exact).abs(), step)[finite].max()
    # A probability below the smallest normal number is 0, for each logit one.
    return ((error - error_of_torch - 2 * tiny * LARGEST) / (SLACK[got.dtype] * step)).item()


def excesses(call: Call) -> tuple[float, float]:
    results = []
    for function in (L.cross_entropy, F.cross_entropy):
        x = call.logits.detach().requires_grad_()
        bytes_in_torch = function is F.cross_entropy and call.target.dtype == torch.uint8
        target = call.target.long() if bytes_in_torch else call.target  # which it smooths in int64 alone
        value = function(x, target, call.weight, None, call.ignore_index, None, call.reduction, call.smoothing)
        if function is L.cross_entropy:
            assert value.grad_fn is not None and value.grad_fn.name() in FUSED
        upstream = call.upstream.to(value.dtype)
        results.append((value.detach(), *torch.autograd.grad(value, x, upstream)))
    (value, grad), (value_of_torch, grad_of_torch) = results
    expected = exact(call, upstream)
    # Where torch's loss alone is NaN or infinite: a class that counts nothing behind a mask, log-probabilities and sums
    # beyond float16, and a mean over targets of weight 0, of which smoothing leaves infinity here and infinity + 0 / 0
    # there.
    excused = (
        expected.adds_masked
        or call.logits.dtype == torch.float16
        or (call.smoothing > 0 and not call.soft and expected.divisor.item() == 0)
    )
    return (
        excess(value, value_of_torch, expected.value, expected.magnitude, excused),
        excess(grad, grad_of_torch, expected.grad, expected.slope, False),
    )


@pytest.mark.examples
@given(one_draw(recipe))
def test_no_less_accurate_than_torch(recipe):
    of_value, of_grad = excesses(cooked(recipe))
    assert of_value <= 1
    assert of_grad <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [2514, 4096, 50257])
@pytest.mark.parametrize("smoothing", [0.1, 0.2, 0.5])
def test_equal_shares_of_many_classes_add_up(smoothing, classes, dtype):
    # Thousands of times the same number: a long chain of additions rounds them all the same way.
    x = torch.randn(2, classes, generator=torch.Generator().manual_seed(0), dtype=dtype)
    target = torch.zeros_like(x).index_fill(1, torch.tensor([7]), 1.0)
    call = Call(x, target, None, -100, smoothing, "mean", torch.tensor(1.25))
    of_value, of_grad = excesses(call)
    assert of_value <= 1
    assert of_grad <= 1
