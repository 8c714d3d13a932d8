"""The gradient of this rank's logits from the combined numbers of the rows, without communication.

A row's gradient by its logits is p_c (K + h (z_c - max)) - s w_c, and less b at the target. The kernels make it from a
row's statistics and its target. On a rank that does not hold the target, class 0 stands in for it: the statistics then
leave out class 0, the kernel adds it again, and what the kernel takes off there is put back, in one number a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses._rows import class_dim
from ._local import NONE, NOWHERE, loss_of, target_logits
from ._row import FAR, Asked, Row, completed


class _Upstream(NamedTuple):
    """The upstream gradients of what is asked for; 0 where there is no target, but for those of every lse."""

    ce: Tensor
    q: Tensor | None = None
    lse: Tensor | None = None
    third: Tensor | None = None


class _Stand(NamedTuple):
    """The target, or what stands in for it."""

    column: Tensor  # of the target here, 0 where it is elsewhere, NOWHERE where there is none
    owned: Tensor
    stands_in: Tensor
    logit: Tensor  # of class 0, as the next three
    gap: Tensor  # z - max
    e: Tensor
    p: Tensor
    statistics: list[Tensor]  # max, and the sum of exp(z - max) without that column


def by_kernels(
    logits: Tensor, column: Tensor, valid: Tensor, weight: Tensor | None, asked: Asked, numbers: Tensor, mass: Tensor,
    upstreams: Sequence[Tensor | None], in_place: bool = False,
) -> Tensor:  # fmt: skip
    """``in_place``: over the logits."""
    row = completed(numbers, asked, mass)
    given = zip(asked.results, upstreams, strict=True)
    upstream = _Upstream(**{name: torch.zeros_like(row.ce) if each is None else each for name, each in given})
    b = upstream.ce
    if upstream.q is not None:
        b = b + torch.where(row.p == 0, 0.0, upstream.q * row.p)  # that of q is infinite where the loss is
    b = torch.where(valid, b, 0.0)  # p may be no number
    stand = _standing(logits, column, valid, asked, numbers, row)
    kernel = _Kernel(logits, stand.column, in_place)
    if asked.spread or asked.lse:
        return _by_mass(kernel, weight, asked, stand, row, mass, b, upstream)
    name, _ = loss_of(asked)
    make = _of_log_probs if name == "log_probs" else _of_cross_entropy
    return make(kernel, asked, stand, numbers, row, b, upstream)


def _standing(logits: Tensor, column: Tensor, valid: Tensor, asked: Asked, numbers: Tensor, row: Row) -> _Stand:
    owned = column >= 0
    stands_in = valid & ~owned
    logit = logits.select(class_dim(logits), 0)
    gap = (asked.z(logit) - row.max).clamp_min(FAR)
    e = gap.exp()
    rest = torch.where(stands_in, (row.total - e).clamp_min(0), row.total)
    statistics = [torch.where(owned, numbers[0], row.max), torch.where(owned, numbers[1], rest)]
    return _Stand(torch.where(stands_in, 0, column), owned, stands_in, logit, gap, e, e / row.total, statistics)


class _Kernel(NamedTuple):
    logits: Tensor
    column: Tensor
    in_place: bool

    def __call__(
        self, name: str, params: list[float], upstream: Tensor, upstream_second: Tensor | None, weight: Tensor | None,
        statistics: list[Tensor],
    ) -> Tensor:  # fmt: skip
        flat = torch.cat([torch.stack(statistics).flatten(), upstream.new_ones(1)])
        made: Tensor | None = getattr(torch.ops.fusedloss, f"{name}_backward{'_' * self.in_place}")(
            upstream.contiguous(), upstream_second if upstream_second is None else upstream_second.contiguous(),
            self.logits, self.column, weight, flat, NONE, NOWHERE, params, None,
        )  # fmt: skip
        return self.logits if made is None else made


def _put(of_logits: Tensor, index: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Sets one column of each row of ``where``. Not by scatter_, which copies half-precision data whole to float32."""
    sizes = index.shape
    places = [
        torch.arange(size, device=index.device).view(-1, *[1] * (len(sizes) - 1 - i)) for i, size in enumerate(sizes)
    ]
    values = torch.where(where, values.to(of_logits.dtype), target_logits(of_logits, index))
    of_logits.movedim(class_dim(of_logits), -1).index_put_((*places, index.clamp_min(0)), values)
    return of_logits


def _of_cross_entropy(
    kernel: _Kernel, asked: Asked, stand: _Stand, numbers: Tensor, row: Row, b: Tensor, upstream: _Upstream
) -> Tensor:
    name, params = loss_of(asked)
    statistics = stand.statistics
    if asked.softcap:  # whose kernel reads the mass of a smoothing, too
        statistics = [*statistics, torch.zeros_like(b)]
    slope = b if upstream.lse is None else b + upstream.lse
    own = torch.where(stand.p == 0, 0.0, slope * stand.p * asked.slope(stand.logit))
    made = kernel(name, params, b, upstream.lse, None, statistics)
    return _put(made, stand.column, stand.stands_in, own)


def _of_log_probs(
    kernel: _Kernel, asked: Asked, stand: _Stand, numbers: Tensor, row: Row, b: Tensor, upstream: _Upstream
) -> Tensor:
    name, params = loss_of(asked)
    statistics, of_entropy, slope = stand.statistics, None, b
    if asked.entropy:
        assert row.sum is not None and upstream.third is not None
        statistics = [*statistics, torch.where(stand.owned, numbers[3], row.sum - stand.e * stand.gap)]
        of_entropy = upstream.third
        slope = b - of_entropy * (stand.gap - row.sum / row.total)
    own = torch.where(stand.p == 0, 0.0, slope * stand.p * asked.slope(stand.logit))
    made = kernel(name, params, -b, of_entropy, None, statistics)
    return _put(made, stand.column, stand.stands_in, own)


def _by_mass(
    kernel: _Kernel, weight: Tensor | None, asked: Asked, stand: _Stand, row: Row, mass: Tensor, b: Tensor,
    upstream: _Upstream,
) -> Tensor:  # fmt: skip
    """By cross-entropy smoothed all the way, which takes nothing off at the target: it is put there afterwards.

    It multiplies p_c by s times the mass that its statistics have, so that these are made to give K. The upstream
    gradient of an lse would make gradients of ignored rows, too, whose logits may be no numbers. It is handed over only
    where the caller has them all.
    """
    classes = kernel.logits.shape[class_dim(kernel.logits)]
    slope = asked.slope(target_logits(kernel.logits, stand.column))
    of_all = b
    if asked.spread:
        assert upstream.third is not None
        s = upstream.third
        of_all = of_all + s * mass
    else:
        s, weight = torch.ones_like(b), b.new_zeros(classes)
    of_lse = upstream.lse
    if of_lse is not None and not asked.every_lse:
        of_all, of_lse = of_all + of_lse, None
    of_class = torch.ones_like(b) if weight is None else weight[stand.column.clamp_min(0)]
    third = torch.where(s == 0, 0.0, of_all / s - of_class)
    made = kernel("cross_entropy", [1.0, 0.0, asked.softcap], s * classes, of_lse, weight, [*stand.statistics, third])
    if of_lse is not None:
        of_all = of_all + of_lse
    own = ((of_all - b) * row.p - b * row.q - s * of_class) * slope
    return _put(made, stand.column, stand.owned, own)
