"""The upstream gradients of rows, in the range where a gradient of the logits keeps its digits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..linear._call import Call
from ..linear._scale import OF_HALF, Scale
from ._row import Asked


def scale_of(call: Call, largest: Tensor) -> tuple[Scale, Tensor]:
    """What the products are multiplied by, and what the upstream gradients are divided by.

    The gradient of the logits is made for upstream gradients up to 1, of which half types hold the target's -1 exactly,
    and float16's up to the number that keeps small probabilities.
    """
    most = OF_HALF if call.input.dtype == torch.float16 else 1.0
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 1.0).double()
    divisor = (largest / most).to(call.arithmetic)
    if call.on_host:
        return Scale(call.logit_scale * float(largest) / most), divisor
    return Scale(call.logit_scale / most, largest.to(call.arithmetic)), divisor


def _largest(asked: Asked, upstreams: Sequence[Tensor | None], mass: Tensor) -> Tensor:
    """A bound of the gradient of any logit before the class weights."""
    bounds = {"third": mass.clamp_min(1) if asked.spread else mass.new_ones(())}
    total: Tensor = mass.new_zeros(())
    for name, each in zip(asked.results, upstreams, strict=True):
        if each is not None and each.numel():
            total = total + each.abs().max().to(mass.dtype) * bounds.get(name, 1.0)
    return total


class Upstream(NamedTuple):
    """The upstream gradients of the rows' results, divided by a number that ``scale`` brings in again."""

    of_results: Sequence[Tensor | None]
    scale: Scale


def upstream_of(call: Call, asked: Asked, of_results: Sequence[Tensor | None], mass: Tensor) -> Upstream:
    scale, divisor = scale_of(call, _largest(asked, of_results, mass))
    return Upstream([each if each is None else each.to(divisor.dtype) / divisor for each in of_results], scale)
