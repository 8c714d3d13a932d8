"""What a rank knows of the rows from its own classes: the numbers that it sends, (numbers, rows)."""

import torch
from torch import Tensor

from .. import _captures
from .._derivatives import transformed
from .._dtypes import arithmetic
from .._library import extension, why_native
from .._sizes import is_empty
from ..losses._rows import class_dim
from ._row import FAR, Asked, lowest, raised, raised_entropy, reference

NONE = _captures.REDUCTIONS["none"]
NOWHERE = -1  # the column of a target that another rank holds, or of none


def by_class(weight: Tensor, logits: Tensor) -> Tensor:
    """The class weights in the place of the logits' classes."""
    return weight.view(-1, *[1] * (logits.dim() - 1 - class_dim(logits)))


def target_logits(logits: Tensor, column: Tensor) -> Tensor:
    """The logits at ``column``, any where there is none."""
    dim = class_dim(logits)
    return logits.gather(dim, column.clamp_min(0).unsqueeze(dim)).squeeze(dim)


def natively(logits: Tensor, column: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
    """In PyTorch's operators, differentiable any number of times."""
    dim = class_dim(logits)
    if logits.shape[dim] == 0:  # one class that is masked and of weight 0, for what torch refuses of none
        rows = list(logits.shape)
        rows[dim] = 1
        logits = torch.cat([logits, logits.new_full(rows, -torch.inf)], dim)
        weight = logits.new_zeros(1, dtype=arithmetic(logits))
    z = asked.z(logits)
    owned = column >= 0
    places = torch.arange(z.shape[dim], device=z.device).view(-1, *[1] * (z.dim() - 1 - dim))
    others = torch.where(places == column.unsqueeze(dim), -torch.inf, z)
    max = others.detach().amax(dim).clamp_min(lowest(z))
    gap = others - max.unsqueeze(dim)
    e = gap.exp()
    numbers = [max, e.sum(dim), torch.where(owned, target_logits(z, column), 0.0)]
    if asked.entropy:
        numbers.append((e * gap.clamp_min(FAR)).sum(dim))
    if asked.spread:
        below = reference(max).unsqueeze(dim) - z
        if weight is not None:
            factor = by_class(weight, z)
            below = torch.where(factor == 0, 0.0, factor * below)  # even of a masked class
        numbers.append(below.sum(dim))
    return torch.stack(numbers)


def loss_of(asked: Asked) -> tuple[str, list[float]]:
    """The loss whose kernels make a row's numbers and its gradient, and its parameters without smoothing."""
    if asked.entropy or asked.temperature != 1:
        return "log_probs", [asked.temperature, float(asked.entropy)]
    return "cross_entropy", [0.0, 0.0, asked.softcap]


def declines(logits: Tensor, column: Tensor, asked: Asked) -> str | None:
    """Why the kernels do not take the logits, or None where they do."""
    if extension is None:
        return why_native
    if why := transformed([logits]):
        return why
    if is_empty(logits):
        return "no logits on this rank"
    name, params = loss_of(asked)
    return _captures.softmax(extension.losses[name].traits, logits, column, None, "none", NOWHERE, params, True, False)


def by_kernels(logits: Tensor, column: Tensor, valid: Tensor, weight: Tensor | None, asked: Asked) -> Tensor:
    """One read of the logits, and one more for a spread.

    The kernels leave out rows without a target, and a target's column. Where another rank holds the target, class 0
    stands in for it, and is added afterwards.
    """
    name, params = loss_of(asked)
    stands_in = valid & (column < 0)
    _, _, statistics = getattr(torch.ops.fusedloss, name)(
        logits, torch.where(stands_in, 0, column), None, NONE, NOWHERE, params, True, asked.every_lse, None
    )
    max, rest, *sums = statistics[:-1].view(-1, *column.shape).unbind()
    z = asked.z(logits.select(class_dim(logits), 0))
    top = torch.maximum(max, z)
    gap, below = max - top, (z - top).clamp_min(FAR)
    own = below.exp()
    numbers = [
        torch.where(stands_in, top, max),
        torch.where(stands_in, raised(rest, gap) + own, rest),
        torch.where(column >= 0, asked.z(target_logits(logits, column)), 0.0),
    ]
    if asked.entropy:
        numbers.append(torch.where(stands_in, raised_entropy(sums[0], rest, gap) + own * below, sums[0]))
    if asked.spread:
        numbers.append(_spread(logits, weight, asked, numbers[0]))
    return torch.stack(numbers)


def _spread(logits: Tensor, weight: Tensor | None, asked: Asked, max: Tensor) -> Tensor:
    """sum_c w_c (reference - z_c), which a loss of probabilities w gives against the lse."""
    factors = max.new_ones(logits.shape[class_dim(logits)]) if weight is None else weight
    probabilities = by_class(factors, logits).expand(logits.shape)
    against_lse, lse, _ = torch.ops.fusedloss.soft_cross_entropy(
        logits, probabilities, None, NONE, NOWHERE, [0.0, 0.0, asked.softcap], True, True, None
    )
    spread = against_lse + factors.sum() * (reference(max) - lse)
    masked = torch.where(factors.ne(0).any(), torch.inf, 0.0).to(lse.dtype)  # where every class of the row is
    return torch.where(lse == -torch.inf, masked, spread)
