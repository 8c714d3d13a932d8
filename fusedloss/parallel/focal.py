"""Softmax focal loss over a sharded vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses._ignored import IgnoreIndex
from ..losses.focal import checked_alpha
from ._call import Sharding, result_dtype, rows
from ._row import Asked


def focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor | None = None,
    gamma: float = 2.0,
    *,
    ignore_index: IgnoreIndex = -100,
    reduction: str = "mean",
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """:func:`fusedloss.functional.focal_loss` of logits whose classes are spread over the ranks of a group.

    Args:
        input, target, group, vocab_start, vocab_size: as for :func:`fusedloss.parallel.cross_entropy`.
        alpha: class weights are those of all classes, whole on every rank.

    The other arguments are those of :func:`fusedloss.functional.focal_loss`, and the errors those of
    :func:`fusedloss.parallel.cross_entropy`.
    """
    listed = alpha if isinstance(alpha, list | tuple) or (isinstance(alpha, Tensor) and alpha.dim() == 1) else ()
    # With its own length: the ranks first hear how many classes there are.
    factor, weight, gamma = checked_alpha("focal_loss", alpha, gamma, reduction, input, len(listed))
    modulated = isinstance(gamma, Tensor) or gamma != 0
    row = rows(
        "focal_loss", input, target, weight, ignore_index, sample_weight, Asked(q=modulated),
        Sharding(group, vocab_start, vocab_size),
    )  # fmt: skip
    losses = row.of("ce")
    if modulated:
        # The derivative of a power of 0 may be infinite, where that of the loss is 0.
        losses = losses * row.of("q").clamp_min(torch.finfo(losses.dtype).tiny) ** gamma
    if row.of_class is not None:
        losses = losses * row.of_class
    return row.reduced(losses * factor, reduction, zero=False, by_weight=False).to(result_dtype(input, None))
