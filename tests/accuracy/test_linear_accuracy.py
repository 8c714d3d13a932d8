"""The linear cross-entropy is no further from float64 than whole logits are, whatever the chunks."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from compare import upstreams
from hypothesis import given
from losses import DTYPES, HALVES
from torch import Tensor

import fusedloss.functional as L


class Call(NamedTuple):
    dtype: torch.dtype
    rows: int
    features: int
    classes: int
    chunk_rows: int
    reduction: str
    smoothing: float
    scale: float
    bias: bool
    soft: bool
    frozen: int  # which of input, head and bias requires no gradient; 3: none
    in_forward: bool | None
    seed: int


def call_of(choose: Choices) -> Call:
    return Call(
        choose.of(DTYPES),
        choose.between(1, 40),
        choose.between(1, 24),
        choose.between(1, 60),
        choose.between(1, 45),
        choose.of(["mean", "sum", "none"]),
        choose.of([0.0, 0.0, 0.1]),
        choose.of([1.0, 4.0]),
        choose.of([False, True]),
        choose.of([False, False, True]),
        choose.between(0, 3),
        choose.of([None, False]),
        choose.between(0, 999),
    )


def error(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((one.double() - other).norm() / other.norm().clamp_min(1e-6)).item() for one, other in zip(got, exact)]  # noqa: B905


@pytest.mark.examples
@given(one_draw(call_of))
def test_no_less_accurate_than_whole_logits(call):
    generator = torch.Generator("cpu").manual_seed(call.seed)
    device = torch.get_default_device()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, call.dtype)

    input, head, bias = random(call.rows, call.features) * call.scale, random(call.classes, call.features), None
    if call.bias:
        bias = random(call.classes)
    if call.soft:
        target = random(call.rows, call.classes).softmax(1)
    else:
        target = torch.randint(call.classes, (call.rows,), generator=generator, device="cpu").to(device)
        target[2::5] = -100

    def run(leaves: list[Tensor], target: Tensor, whole: bool) -> list[Tensor]:
        leaves = [each.detach().requires_grad_(i != call.frozen) for i, each in enumerate(leaves)]
        x, w, b = (*leaves, None)[:3]
        options = {"reduction": call.reduction, "label_smoothing": call.smoothing}
        if whole:
            value = F.cross_entropy(F.linear(x, w, b), target, **options)
        else:
            value = L.linear_cross_entropy(
                x, w, target, linear_bias=b, chunk_rows=call.chunk_rows, grad_in_forward=call.in_forward, **options
            )
        wanted = [each for each in leaves if each.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, wanted, upstreams(value)[0].to(value.dtype))]

    leaves = [input, head, *([] if bias is None else [bias])]
    exact = run([each.double() for each in leaves], target.double() if call.soft else target, True)
    if not exact[0].isfinite().all():
        return  # a mean over nothing
    ours, torchs = run(leaves, target, False), run(leaves, target, True)
    # Our logits are rounded as torch's are, and after that fewer numbers: what is left is luck, of few numbers.
    steps = 6 if call.dtype in HALVES else 40
    for got, limit in zip(error(ours, exact), error(torchs, exact), strict=True):
        assert got <= 1.5 * limit + steps * torch.finfo(call.dtype).eps
