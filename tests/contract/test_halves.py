"""Half-precision numbers go through the kernels in groups of 32, bfloat16 out of order: at every length, and for every
place of the target, they give what the same numbers give in float32, rounded once."""

import pytest
import torch
from losses import HALVES, ONE_OF_EACH, loss_named
from marks import needs_extension

import fusedloss.functional as F

pytestmark = needs_extension
# Around a group, two and a block of 4096; rows this short go by columns or by rows.
CLASSES = [23, 31, 32, 33, 63, 64, 65, 119, 128, 150, 4095, 4096, 4097, 4127, 4130]
LENGTHS = [1, 31, 32, 33, 65, 2047, 2048, 2049, 2080, 4099]
STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}  # to the next number, relative


def close(half: torch.Tensor, whole: torch.Tensor) -> None:
    torch.testing.assert_close(half.double(), whole.to(half.dtype).double(), rtol=STEP[half.dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("in_forward", [True, False])
def test_rows(dtype, classes, in_forward):
    rows = 40
    generator = torch.Generator().manual_seed(classes)
    x = (torch.randn(rows, classes, generator=generator) * 4).to(dtype)
    x[1, ::3] = -torch.inf
    y = torch.linspace(0, classes - 1, rows).long()
    y[1] = 1
    found = []
    for leaf in (x.clone().requires_grad_(), x.float().requires_grad_()):
        loss = F.cross_entropy(leaf, y, reduction="sum", grad_in_forward=in_forward)
        (grad,) = torch.autograd.grad(loss, leaf)
        found.append((F.cross_entropy(leaf.detach(), y, reduction="none"), loss.detach(), grad))
    for half, whole in zip(*found, strict=True):
        close(half, whole)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("loss", ONE_OF_EACH, ids=lambda loss: loss.name)
def test_every_loss(loss, dtype):
    x, target = loss.data((5, 150), dtype)
    found = []
    for leaf, t in ((x, target), (x.float(), target.float() if target.is_floating_point() else target)):
        leaf = leaf.clone().requires_grad_()
        losses = loss.fused(leaf, t, "none")
        (grad,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
        found.append((losses.detach(), grad))
    for half, whole in zip(*found, strict=True):
        close(half, whole)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("target_dtype", [None, torch.float32], ids=["alike", "mixed"])
def test_elements(dtype, length, target_dtype):
    loss = loss_named("smooth_l1")
    x, target = loss.data((length,), torch.float64)
    x, target = x.to(dtype), target.to(target_dtype or dtype)
    found = []
    for leaf, t in ((x.clone().requires_grad_(), target), (x.float().requires_grad_(), target.float())):
        value = loss.fused(leaf, t, "sum")
        (grad,) = torch.autograd.grad(value, leaf)
        found.append((loss.fused(leaf.detach(), t, "none"), value.detach(), grad))
    for half, whole in zip(*found, strict=True):
        close(half, whole)
