"""A cell: a loss with a reduction in a situation, run beside plain PyTorch."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import ecosystem  # noqa: F401  (adds its situations)
import torch
import torch.nn.functional as F
from losses import NATIVE, OF_THREE, ONE_OF_EACH, REDUCTIONS, Loss
from situations import PLAIN, SITUATIONS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fusedloss.functional as L

PATHS = ("fused", "native", "refused")
Cell = tuple[str, str, str]  # situation, loss, reduction
Call = Callable[[Tensor, Tensor], Tensor]


def _head(input: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 40, dtype=input.dtype).sin().view(8, 5)


LINEAR = Loss(
    "linear cross entropy",
    "softmax",
    lambda x, t, reduction: L.linear_cross_entropy(x, _head(x), t, reduction=reduction, chunk_rows=2),
    lambda x, t, reduction: F.cross_entropy(F.linear(x, _head(x)), t, reduction=reduction),
    "linear",
)


def _of_rows(name: str, run: Callable[[Any, Tensor, Tensor, str], Tensor]) -> Loss:
    """A loss of row sums, whose other operands and targets follow from a target between 0 and 1."""
    return Loss(name, "pointwise", functools.partial(run, L), functools.partial(run, F), name)


OF_ROWS = [
    _of_rows(
        "cosine embedding", lambda f, x, t, r: f.cosine_embedding_loss(x, t, 2 * t[..., 0].round() - 1, reduction=r)
    ),
    _of_rows("triplet margin", lambda f, x, t, r: f.triplet_margin_loss(x, t, t.flip(-1), reduction=r)),
    _of_rows("multi margin", lambda f, x, t, r: f.multi_margin_loss(x, t.argmax(-1), reduction=r)),
]


def _divergence(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    q, p = ((each / 2).log_softmax(-1) for each in (input, target))
    products = F.kl_div(q, p, reduction="none" if reduction == "none" else "sum", log_target=True)
    if reduction == "none":
        return products.sum(-1)
    return products if reduction == "sum" else products / input.numel()


DISTILLATION = Loss(
    "kl_divergence",
    "pointwise",
    lambda x, t, reduction: L.kl_divergence(x, t, temperature=2.0, reduction=reduction),
    _divergence,
    "kl_divergence",
)
LOSSES = [*ONE_OF_EACH, LINEAR, *OF_ROWS, DISTILLATION]
CELLS: list[Cell] = [
    (situation, loss.name, reduction) for situation in SITUATIONS for loss in LOSSES for reduction in REDUCTIONS
]
_WITH_DEFAULTS = [loss for loss in ONE_OF_EACH if loss.name == loss.op]


def path_of(cell: Cell) -> str:
    """Which path the call takes; compares what it gives or raises with what plain PyTorch does."""
    situation, name, reduction = cell
    loss = next(each for each in LOSSES if each.name == name)
    ours, torchs = (functools.partial(_call, function, reduction) for function in (_public(loss), _native(loss)))
    return compared(situation, loss, ours, torchs)


def compared(
    situation: str, loss: Loss, ours: Call, torchs: Call, around: Callable[[], Any] = contextlib.nullcontext
) -> str:
    """The path of ``ours``, which runs within ``around``; its results or its error are those of ``torchs``."""
    input, target = loss.data((6, 5), torch.float32, seed=2)

    def run(call: Call, where: dict[str, Any] = SITUATIONS) -> Any:
        torch.manual_seed(0)
        try:
            return list(_tensors(where[situation](call, input.clone(), target.clone())))
        except Exception as error:
            return error

    with around():
        got, fused = _watched(lambda: run(ours))
    expected = run(torchs)
    if isinstance(expected, Exception) and situation in PLAIN and not isinstance(got, Exception):
        expected = run(torchs, PLAIN)
    if isinstance(expected, Exception):
        # torch has no divergence of logits whose errors there are to be: ours names the argument.
        alike = isinstance(got, Exception) if loss is DISTILLATION else type(got) is type(expected)
        assert alike, f"expected {expected!r} as from torch, got {got!r}"
        return "refused"
    if isinstance(got, Exception):
        raise got
    in_half = "autocast" in situation
    torch.testing.assert_close(got, expected, rtol=2e-2 if in_half else 1e-4, atol=1e-2 if in_half else 1e-5)
    return "fused" if fused else "native"


def _public(loss: Loss) -> Callable[..., Tensor]:
    """The function that a user calls, where it has the loss's parameters."""
    if "cross_entropy" in loss.op and loss.family == "softmax":
        smoothing = loss.params[0] if loss.params else 0.0
        return lambda x, t, reduction: L.cross_entropy(x, t, reduction=reduction, label_smoothing=smoothing)
    if loss.op == "log_probs":
        return functools.partial(_log_probs, loss.params[0])
    if loss.op == "asymmetric":
        return lambda x, t, reduction: L.asymmetric_loss(x, t, *loss.params, reduction=reduction)
    if loss.op == "margin_ranking":
        return lambda x, t, reduction: L.margin_ranking_loss(x, t, third_of(loss, t), *loss.params, reduction=reduction)
    if loss.op == "gaussian_nll":
        eps, full = loss.params[0], bool(loss.params[1])
        return lambda x, t, reduction: L.gaussian_nll_loss(x, t, third_of(loss, t), full, eps, reduction)
    if loss in _WITH_DEFAULTS:
        function = getattr(L, f"{loss.op}_loss", None) or getattr(L, loss.op)
        return lambda x, t, reduction: function(x, t, reduction=reduction)
    return loss.fused


def _native(loss: Loss) -> Callable[..., Tensor]:
    if loss.op not in OF_THREE:
        return loss.native
    formula = NATIVE[loss.op]
    return lambda x, t, reduction: formula(x, t, None, reduction, *loss.params, third=third_of(loss, t))


def third_of(loss: Loss, target: Tensor) -> Tensor:
    """Labels or variances that follow from targets between 0 and 1."""
    return 2 * (target > 0.5).to(target.dtype) - 1 if loss.op == "margin_ranking" else target + 0.25


def _log_probs(temperature: float, logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    values = L.log_probs(logits, target, temperature=temperature)
    if reduction == "none":
        return values
    return values.sum() / (target != -100).sum() if reduction == "mean" else values.sum()


def _call(function: Callable[..., Tensor], reduction: str, input: Tensor, target: Tensor) -> Tensor:
    return function(input, target, reduction)


def _watched(run: Callable[[], Any]) -> tuple[Any, bool]:
    """What it returns, and whether an operator of the package ran."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        result = run()
    return result, any(event.name().startswith("fusedloss::") for event in profiled.profiler.kineto_results.events())


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for each in result:
            yield from _tensors(each)
