"""The check of a new loss in float64: its value is the native one, its slopes are finite differences."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._expression import Tree, evaluate
from ._printing import text

Trees = tuple[Tree, Tree, Tree]  # the value and its slopes by x and t
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # the losses and their slopes by x and t


def as_expressed(trees: Trees, params: Mapping[str, float]) -> Run:
    """The expressions, as they are before a compiler runs."""

    def run(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, by_input, by_target = (evaluate(tree, {"x": x, "t": t, **params}) for tree in trees)
        return value, by_input, by_target

    return run


def as_routed(routed: Callable[..., Tensor], params: Mapping[str, float]) -> Run:
    def run(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
        with torch.enable_grad():
            value = routed(x, t, None, "none", *params.values())
            slopes = torch.autograd.grad(value.sum(), (x, t), allow_unused=True)
        by_input, by_target = (torch.zeros_like(x) if slope is None else slope for slope in slopes)
        return value, by_input, by_target

    return run


@torch.no_grad()
def check(name: str, trees: Trees, params: Mapping[str, float], run: Run) -> None:
    """Raises ValueError at a number of ``run`` that is off."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(scale: float, offset: float) -> Tensor:
        return scale * torch.rand(256, generator=generator, dtype=torch.float64, device="cpu") + offset

    def native(x: Tensor, t: Tensor) -> Tensor:
        return evaluate(trees[0], {"x": x, "t": t, **params})

    step = 1e-6
    for x, t in (
        (random(6, -3), random(6, -3)),
        (random(0.9, 0.05), random(0.9, 0.05)),
        (random(4, 0.1), random(1, 0)),
    ):
        expected = (
            native(x, t),
            (native(x + step, t) - native(x - step, t)) / (2 * step),
            (native(x, t + step) - native(x, t - step)) / (2 * step),
        )
        for what, tree, got, wanted in zip(("value", "d/dx", "d/dt"), trees, run(x, t), expected, strict=True):
            bound = 1e-9 if what == "value" else 1e-4
            compare(f"{name}: {what} = {text(tree)}", got, wanted, {"x": x, "t": t}, bound)


def compare(subject: str, got: Tensor, expected: Tensor, at: Mapping[str, Tensor], bound: float) -> None:
    """Raises ValueError where more than two numbers are off; ``at`` says where each is."""
    off = (got - expected).abs() > bound * (1 + expected.abs())
    off &= got.isfinite() & expected.isfinite()
    # A kink between the two points of a difference puts one or two of the 256 elements off; a mistake more.
    if off.sum() > 2:
        i = int(off.nonzero()[0])
        against = "a difference of values" if ": d/d" in subject else "PyTorch"
        place = ", ".join(f"{name} = {value[i]:.6g}" for name, value in at.items())
        raise ValueError(f"{subject} is {got[i]:.6g} at {place}, where {against} gives {expected[i]:.6g}")
