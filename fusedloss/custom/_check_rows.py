"""The check of a new loss of rows in float64: slopes are finite differences, and the kernels give PyTorch's numbers."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._check import compare
from ._expression import evaluate, names
from ._printing import text
from ._source import RowTrees

_STEP = 1e-6


@torch.no_grad()
def check_slopes(name: str, trees: RowTrees, params: Mapping[str, float]) -> None:
    """Raises ValueError at a slope that is no finite difference of the value."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(scale: float, offset: float) -> Tensor:
        return scale * torch.rand(256, generator=generator, dtype=torch.float64, device="cpu") + offset

    nll, ce, lse, weight = random(4, 0.05), random(4, 0.05), random(6, -3), random(1, 0.5)

    def at(nll: Tensor, ce: Tensor, lse: Tensor = lse) -> dict[str, Tensor | float]:
        p, q = torch.exp(-nll), -torch.expm1(-nll)
        return {"ce": ce, "nll": nll, "p": p, "q": q, "lse": lse, "weight": weight, **params}

    def value(*point: Tensor) -> Tensor:
        return evaluate(trees.value, at(*point))

    h = _STEP
    checks = {
        "d/dce": (trees.by_ce, at(nll, nll), value(nll + h, nll + h) - value(nll - h, nll - h)),
        "d/dlse": (trees.by_lse, at(nll, ce), value(nll, ce, lse + h) - value(nll, ce, lse - h)),
    }
    if "ce" in names(trees.value):
        checks["d/dce with label smoothing"] = (
            trees.by_ce_alone, at(nll, ce), value(nll, ce + h) - value(nll, ce - h)
        )  # fmt: skip
        checks["d/dnll with label smoothing"] = (
            trees.by_nll_alone, at(nll, ce), value(nll + h, ce) - value(nll - h, ce)
        )  # fmt: skip
    for what, (tree, point, difference) in checks.items():
        places = {"nll": nll, "ce": nll if what == "d/dce" else ce, "lse": lse}
        compare(f"{name}: {what} = {text(tree)}", evaluate(tree, point), difference / (2 * h), places, 1e-4)


def check_routed(
    name: str, trees: RowTrees, params: Mapping[str, float], routed: Callable[..., Tensor],
    native: Callable[..., Tensor],
) -> None:  # fmt: skip
    """Raises ValueError at a number of the routed loss that is not the native one."""
    generator = torch.Generator("cpu").manual_seed(0)
    logits = 2 * torch.randn(256, 5, generator=generator, dtype=torch.float64, device="cpu")
    target = torch.randint(5, (256,), generator=generator, device="cpu")
    weight = torch.rand(5, generator=generator, dtype=torch.float64, device="cpu") + 0.5

    def run(loss: Callable[..., Tensor], smoothing: float) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        with torch.enable_grad():
            losses = loss(leaf, target, weight, "none", -100, smoothing, *params.values())
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grad

    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    for smoothing in (0.0, 0.1) if "ce" in names(trees.value) else (0.0,):
        pairs = zip(run(routed, smoothing), run(native, smoothing), (nll, nll.repeat_interleave(5)), strict=True)
        for what, (got, expected, place) in zip(("value", "gradient"), pairs, strict=True):
            subject = f"{name}: {what} of {text(trees.value)} with a label smoothing of {smoothing}"
            compare(subject, got.flatten(), expected.flatten(), {"nll": place}, 1e-9)
