"""Losses of rows that have weights, and what plain PyTorch makes of the rows that count, picked by indexing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, upstream_of
from losses import HALVES
from torch import Tensor

import fusedloss.functional as L

INFINITY, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Call:
    """A public loss of (input, target), and the losses of (rows, classes) in plain PyTorch."""

    name: str
    loss: Callable[..., Any]
    of_rows: Callable[..., Tensor]
    op: str | None
    soft: bool = False
    params: tuple[float, ...] = ()


def _cross_entropy(x: Tensor, t: Tensor, w: Tensor | None, smoothing: float, z_loss: float, softcap: float) -> Tensor:
    x = torch.where(x == -INFINITY, x, softcap * (x / softcap).tanh()) if softcap else x
    losses = F.cross_entropy(x, t, w, label_smoothing=smoothing, reduction="none")
    return losses + z_loss * x.logsumexp(1).square()


def _entropies(name: str, smoothing: float, z_loss: float, softcap: float, soft: bool = False) -> Call:
    return Call(
        name,
        lambda x, t, w=None, **o: L.cross_entropy(
            x, t, w, label_smoothing=smoothing, z_loss=z_loss, softcap=softcap or None, **o
        ),
        lambda x, t, w: _cross_entropy(x, t, w, smoothing, z_loss, softcap),
        "soft_cross_entropy" if soft else "cross_entropy",
        soft,
        (smoothing, z_loss, softcap),
    )


def _focal(x: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    if t.is_floating_point():
        p, factor = x.softmax(1), torch.ones(x.shape[1], dtype=x.dtype) if w is None else w
        return (factor * t * (1 - p).square() * -x.log_softmax(1)).sum(1)
    ce = F.cross_entropy(x, t, reduction="none")
    return (1 if w is None else w[t]) * (1 - (-ce).exp()).square() * ce


CALLS = [
    _entropies("cross_entropy", 0.0, 0.0, 0.0),
    _entropies("smoothed", 0.1, 0.0, 0.0),
    _entropies("z-loss and softcap", 0.1, 1e-2, 5.0),
    _entropies("probabilities", 0.0, 0.0, 0.0, soft=True),
    _entropies("smoothed probabilities", 0.1, 1e-2, 5.0, soft=True),
    Call("nll", L.nll_loss, lambda x, t, w: F.nll_loss(x, t, w, reduction="none"), "nll"),
    Call("focal", lambda x, t, w=None, **o: L.focal_loss(x, t, w, 2.0, **o), _focal, "focal", params=(1.0, 2.0)),
    Call("focal of probabilities", lambda x, t, w=None, **o: L.focal_loss(x, t, w, 2.0, **o), _focal, None, True),
]
FUSED = [call for call in CALLS if call.op]
SHAPES = {
    "one row": (5,),
    "few classes": (300, 5),
    "rows": (11, 150),
    "one class": (9, 1),
    "classes apart": (3, 5, 40),
    "classes far apart": (2, 40, 33),
    "long rows": (3, 50000),
}
each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
each_fused = pytest.mark.parametrize("call", FUSED, ids=lambda call: call.name)


def data(call: Call, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a target and weights of the rows: some are 0, with logits that are no numbers, some below 0."""
    generator = torch.Generator("cpu").manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").mul(3).to(dtype)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    s = torch.rand(rows, generator=generator, device="cpu") + 0.5
    if call.soft:
        t = torch.rand(shape, generator=generator, device="cpu").softmax(min(len(shape) - 1, 1)).to(dtype)
    else:
        t = torch.randint(shape[min(len(shape) - 1, 1)], rows, generator=generator, device="cpu")
    if rows:
        s.view(-1)[1::8] = 0
        s.view(-1)[2::8] = -0.25
        t.view(-1)[2::8] = t.view(-1)[2::8] if call.soft else -100
        of_rows = x.movedim(min(len(shape) - 1, 1), -1)
        for i, value in enumerate((NAN, INFINITY, -INFINITY)):
            of_rows[torch.nonzero(s == 0)[i::3].unbind(1)] = value
    device = torch.get_default_device()
    return x.to(device), t.to(device), s.to(device)


def exact(call: Call, x: Tensor, t: Tensor, s: Tensor, w: Tensor | None, reduction: str, zero: bool = False) -> Tensor:
    """In float64, of the rows that count alone."""
    classes, shape = min(x.dim() - 1, 1), s.shape
    x = x.movedim(classes, -1).reshape(-1, x.shape[classes])
    t = t.double().movedim(classes, -1).reshape(x.shape) if call.soft else t.flatten()
    s = s.double().flatten()
    kept = s != 0 if call.soft else (s != 0) & (t != -100)
    losses = s[kept] * call.of_rows(x[kept], t[kept], None if w is None else w.double())
    if reduction == "none":
        return x.new_zeros(s.shape).masked_scatter(kept, losses).view(shape)
    if reduction == "sum":
        return losses.sum()
    by_weight = w is not None and call.op in ("cross_entropy", "nll")
    return losses.sum() / (s[kept] * w.double()[t[kept]] if by_weight else s[kept]).sum()


def gradients(run: Callable[..., Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = run(leaf)
    return value.detach(), torch.autograd.grad(value, leaf, upstream.to(value.dtype))[0]


def check(call: Call, x: Tensor, t: Tensor, s: Tensor, w: Tensor | None, reduction: str, **options: Any) -> None:
    run = lambda x: call.loss(x, t, w, reduction=reduction, sample_weight=s, **options)  # noqa: E731
    upstream = upstream_of(run(x))
    value, grad = gradients(run, x, upstream)
    exact_value, exact_grad = gradients(lambda x: exact(call, x.double(), t, s, w, reduction), x.double(), upstream)
    steps = 16 if x.dtype in HALVES else 512
    assert value.shape == exact_value.shape and value.isfinite().all() and grad.isfinite().all()
    assert_close(value, exact_value, steps)
    assert_close(grad, exact_grad, steps)
    classes = min(x.dim() - 1, 1)
    without = (s == 0).unsqueeze(classes).expand_as(grad)
    assert not grad[without].any() and (reduction != "none" or not value[s == 0].any())
