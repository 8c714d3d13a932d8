"""Cross-entropy over a sharded vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from ..losses._ignored import IgnoreIndex
from ..losses._numbers import NUMBERS, checked
from ..losses.cross_entropy import checked_options
from ._call import Rows, Sharding, result_dtype, rows
from ._numbers import fixed
from ._row import Asked


class Terms(NamedTuple):
    """What a row's loss is made of."""

    smoothing: float
    z_loss: float | Tensor
    asked: Asked

    @classmethod
    def checked(
        cls, function: str, label_smoothing: Any, z_loss: Any, softcap: Any, all_ignored: str,
        out_dtype: torch.dtype | None, return_lse: bool,
    ) -> "Terms":  # fmt: skip
        smoothing = max(fixed(function, "label_smoothing", label_smoothing), 0.0)
        if smoothing > 1:
            raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing}")
        if not isinstance(z_loss, NUMBERS):
            z_loss = checked(function, "z_loss", z_loss)
        if softcap is not None:
            softcap = fixed(function, "softcap", softcap)
        cap = checked_options(function, z_loss, softcap, all_ignored, out_dtype)
        squared = isinstance(z_loss, Tensor) or z_loss != 0
        asked = Asked(softcap=cap, spread=smoothing > 0, lse=squared and not return_lse, every_lse=return_lse)
        return cls(smoothing, z_loss, asked)

    def losses(self, row: Rows) -> Tensor:
        losses = row.of("ce") if row.of_class is None else row.of_class * row.of("ce")
        if self.asked.spread:
            losses = (1 - self.smoothing) * losses + self.smoothing / row.total * row.of("third")
        if isinstance(self.z_loss, Tensor) or self.z_loss != 0:
            losses = losses + self.z_loss * row.of("lse").square()
        return losses


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: IgnoreIndex = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    all_ignored: str = "nan",
    return_lse: bool = False,
) -> Any:
    r""":func:`fusedloss.functional.cross_entropy` of logits whose classes are spread over the ranks of a group.

    Every rank passes the logits of its own classes, and all else alike, and gets the whole loss, the same bits on
    every rank. Backward gives the gradient of its own logits, for an upstream gradient that is the same on every rank.
    Forward communicates once, an all_gather of 3 numbers a row (4 with smoothing), or twice with fewer bytes on many
    ranks; backward does not.

    Args:
        input: this rank's logits (C_local), (N, C_local) or (N, C_local, d1, ...). A rank may hold no class at all.
        target: class indices of all classes (), (N) or (N, d1, ...) in int64 or uint8, the same on every rank.
        weight: a factor for each class of all ranks, whole on every rank.
        group: the ranks that hold the classes, in their order: a ProcessGroup, or a DeviceMesh of one dimension. None
            is every rank.
        vocab_start: the first class of this rank; with ``vocab_size``. None: classes are cut as :func:`torch.chunk` and
            DTensor's ``Shard`` cut them.
        vocab_size: the number of classes of all ranks. None: every rank holds as many as this one.

    The other arguments are those of :func:`fusedloss.functional.cross_entropy`. ``softcap`` and ``label_smoothing`` are
    numbers, and class probabilities are not taken. Backward reads the logits a second time, whatever makes a gradient
    in forward in the whole loss.

    Raises:
        ValueError: on every rank, where the ranks' classes leave a gap, overlap or do not add up to ``vocab_size``, or
            their targets or dtypes differ. On a GPU that is looked at once for each way to cut the classes; a call that
            is not looked at, like a compiled one, has a NaN loss.
        IndexError: on every rank, for a label that names no class; on a GPU as for the whole loss.
        RuntimeError: ``weight`` requires a gradient or is not of ``vocab_size``; ``input`` is a DTensor.
        TypeError, ValueError, RuntimeError: as the whole loss.
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    terms = Terms.checked("cross_entropy", label_smoothing, z_loss, softcap, all_ignored, out_dtype, return_lse)
    dtype = result_dtype(input, out_dtype)
    if out_dtype == torch.float64:
        input = input.double()
    row = rows(
        "cross_entropy", input, target, weight, ignore_index, sample_weight, terms.asked,
        Sharding(group, vocab_start, vocab_size),
    )  # fmt: skip
    loss = row.reduced(terms.losses(row), reduction, all_ignored == "zero", by_weight=True).to(dtype)
    return (loss, row.lse.to(dtype)) if return_lse else loss
