"""A row of logits from what its parts on the ranks are known by, as csrc/losses/row.h makes it from its columns.

A part is known by the max of its columns, the sum of exp(z - max) and, where it holds the target, the target's z. The
first two leave out the target's column, so that a confident row keeps its digits. The parts are combined in the order
of ranks, by the same operators on the same numbers, so that every rank gets the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import in_float
from ..losses.cross_entropy import capped

FAR = -1000.0  # exp of it is 0 in every dtype, and no product with it is infinite


class Asked(NamedTuple):
    """What the softmax is taken of, and what is wanted of a row beside its cross-entropy."""

    softcap: float = 0.0  # 0 caps nothing
    temperature: float = 1.0
    spread: bool = False  # sum_c w_c (lse - z_c), for label smoothing
    entropy: bool = False  # -sum_c p_c log p_c
    q: bool = False  # 1 - p of the target
    lse: bool = False  # where there is a target
    every_lse: bool = False  # of every row

    @property
    def results(self) -> list[str]:
        """The names of what is wanted, in the order in which it is given."""
        wanted = {"q": self.q, "lse": self.lse or self.every_lse, "third": self.spread or self.entropy}
        return ["ce", *[name for name, yes in wanted.items() if yes]]

    @property
    def numbers(self) -> int:
        """How many numbers of a row a rank sends."""
        return 4 if self.spread or self.entropy else 3

    def z(self, logits: Tensor) -> Tensor:
        z = capped(in_float(logits), self.softcap)
        return z if self.temperature == 1 else z * (1 / self.temperature)  # rounded as in the kernels

    def slope(self, logits: Tensor) -> Tensor | float:
        """dz / dlogit."""
        if not self.softcap:
            return 1 / self.temperature
        e = (in_float(logits).abs() * (-2 / self.softcap)).exp()
        return 4 * e / (1 + e).square()


class Row(NamedTuple):
    """With p the softmax probability of the target: ce = -log p, and q = 1 - p without the rounding of p."""

    ce: Tensor
    q: Tensor
    lse: Tensor
    third: Tensor | None  # the spread or the entropy
    p: Tensor
    # Over all columns. The lse stands for the first two, but has fewer digits than they.
    max: Tensor
    total: Tensor  # of exp(z - max)
    sum: Tensor | None  # of exp(z - max) (z - max), for an entropy


def lowest(like: Tensor) -> float:
    """The max of a part without columns, finite so that no difference of two of them is NaN."""
    return float(torch.finfo(like.dtype).min)


def reference(max: Tensor) -> Tensor:
    """What a part's spread is measured from: 0 where it has no column but the target's."""
    return torch.where(max == lowest(max), 0.0, max)


def raised(rest: Tensor, gap: Tensor) -> Tensor:
    """The sum of exp(z - max), seen from a max that is -gap higher."""
    return rest * gap.exp()


def raised_entropy(sum: Tensor, rest: Tensor, gap: Tensor) -> Tensor:
    """The sum of exp(z - max) (z - max), which :func:`raised` goes with."""
    return (sum + rest * gap) * gap.exp()


def seen_from(top: Tensor, numbers: Tensor, mass: Tensor, asked: Asked) -> list[Tensor]:
    """What a part (numbers, rows) adds to all numbers of its rows but the max, ``top``; or each of (numbers, ranks,
    rows). ``mass``: the sum of its class weights."""
    max = numbers[0].detach()
    gap = max - top
    seen = [raised(numbers[1], gap), numbers[2]]
    if asked.entropy:
        seen.append(raised_entropy(numbers[3], numbers[1], gap))
    if asked.spread:
        seen.append(numbers[3] + mass * (reference(top) - reference(max)))
    return seen


def merged(blocks: Tensor, valid: Tensor, asked: Asked, masses: Tensor) -> Tensor:
    """Blocks (ranks, numbers, rows) of all ranks as one, (numbers, rows).

    ``masses``: the sum of each rank's class weights. ``valid``: which rows have a target; the others' z is -infinity.
    """
    top = blocks[:, 0].detach().amax(0)
    seen = seen_from(top, blocks.movedim(1, 0), masses.view(-1, *[1] * top.dim()), asked)
    rest, z, *sums = (each.sum(0) for each in seen)
    return torch.stack([top, rest, torch.where(valid, z, -torch.inf), *sums])


def completed(numbers: Tensor, asked: Asked, mass: Tensor) -> Row:
    """Adds the target's column. ``mass``: the sum of all class weights."""
    of_others, z = numbers[0], numbers[2]
    top = torch.maximum(of_others, z).detach()
    gap = (of_others - top).detach().clamp_min(lowest(top))
    rest, own = raised(numbers[1], gap), (z - top).exp()
    total = rest + own
    # total - 1, formed without ever adding and taking away the 1, that of the target or that of another column.
    log_total = torch.where(z >= of_others, rest + (own - 1), (rest - 1) + own).log1p()
    lse = top + log_total
    third = sum = None
    if asked.entropy:
        sum = raised_entropy(numbers[3], numbers[1], gap) + own * (z - top).clamp_min(FAR)
        third = log_total - sum / total
    if asked.spread:
        third = numbers[3] + mass * (lse - reference(of_others))
    return Row((top - z) + log_total, rest / total, lse, third, own / total, top, total, sum)
