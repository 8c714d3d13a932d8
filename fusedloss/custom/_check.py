"""The check of a new loss in float64: its value is the native one, its slopes are finite differences."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._expression import OF_THREE, Tree, evaluate
from ._printing import text

Trees = tuple[Tree, ...]  # the value and its slopes by x, t and, where the loss has one, v
Run = Callable[..., tuple[Tensor, ...]]  # of the operands: the losses and their slopes by each


def operands_of(trees: Trees) -> tuple[str, ...]:
    return OF_THREE.names[: len(trees) - 1]


def as_expressed(trees: Trees, params: Mapping[str, float]) -> Run:
    """The expressions, as they are before a compiler runs."""

    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Tensor | float] = {**dict(zip(operands_of(trees), operands, strict=True)), **params}
        return tuple(evaluate(tree, values) for tree in trees)

    return run


def as_routed(routed: Callable[..., Tensor], params: Mapping[str, float]) -> Run:
    def run(*operands: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in operands]
        x, t, *third = leaves
        with torch.enable_grad():
            value = routed(x, t, None, "none", *params.values(), **({"third": third[0]} if third else {}))
            slopes = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        return value, *(torch.zeros_like(x) if slope is None else slope for slope in slopes)

    return run


@torch.no_grad()
def check(name: str, trees: Trees, params: Mapping[str, float], run: Run) -> None:
    """Raises ValueError at a number of ``run`` that is off."""
    generator = torch.Generator("cpu").manual_seed(0)
    names = operands_of(trees)

    def random(scale: float, offset: float) -> Tensor:
        return scale * torch.rand(256, generator=generator, dtype=torch.float64, device="cpu") + offset

    def native(*operands: Tensor) -> Tensor:
        return evaluate(trees[0], {**dict(zip(names, operands, strict=True)), **params})

    def slope(operands: list[Tensor], of: int) -> Tensor:
        step = 1e-6
        above, below = (
            native(*(each + by if i == of else each for i, each in enumerate(operands))) for by in (step, -step)
        )
        return (above - below) / (2 * step)

    for ranges in (((6, -3), (6, -3), (6, -3)), ((0.9, 0.05),) * 3, ((4, 0.1), (1, 0), (4, 0.1))):
        operands = [random(*each) for _, each in zip(names, ranges, strict=False)]
        expected = (native(*operands), *(slope(operands, i) for i in range(len(names))))
        whats = ("value", *(f"d/d{operand}" for operand in names))
        for what, tree, got, wanted in zip(whats, trees, run(*operands), expected, strict=True):
            bound = 1e-9 if what == "value" else 1e-4
            at = dict(zip(names, operands, strict=True))
            compare(f"{name}: {what} = {text(tree)}", got, wanted, at, bound)


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
