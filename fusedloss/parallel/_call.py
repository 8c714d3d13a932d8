"""What the losses share: the arguments, the checks of the labels and of the ranks, and the reductions.

Nothing that another rank may see otherwise raises before all ranks have heard of it, because a rank that raises alone
leaves the others waiting.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _route, _torchs
from .._dtypes import HALVES, arithmetic, widened
from .._library import extension
from .._sizes import rows_of, same_shape
from .._weighted import check, reduced_by_weight
from ..losses._dtensors import refuse_dtensor
from ..losses._ignored import MASKED, is_one, with_one_index
from ..losses._rows import class_dim, class_index, reduced
from . import _exchange, _local, _shards
from ._local import NONE, NOWHERE
from ._row import Asked
from ._rows import Given, of_rows
from ._shards import Shard, shard_of


class Sharding(NamedTuple):
    """The arguments that the whole loss does not have."""

    group: Any = None
    vocab_start: int | None = None
    vocab_size: int | None = None


class Rows(NamedTuple):
    """The numbers of all rows."""

    results: dict[str, Tensor]  # by name, those that are asked for
    valid: Tensor  # which rows count
    kept: Tensor  # which rows a mean counts, those of weight 0 among them
    of_class: Tensor | None  # the class weight of the target
    sample_weight: Tensor | None
    doubt: Tensor  # 0, or NaN where a label is out of range or the ranks do not agree, and nobody could raise it
    total: int  # classes

    def part(self, index: Any, results: dict[str, Tensor]) -> "Rows":
        """Some of the rows, with these results."""
        of_class, s = self.of_class, self.sample_weight
        return Rows(
            results, self.valid[index], self.kept[index], of_class if of_class is None else of_class[index],
            s if s is None else s[index], self.doubt[index], self.total,
        )  # fmt: skip

    def of(self, name: str) -> Tensor:
        """A result, and 0 where a row does not count."""
        return self.counted(self.results[name])

    @property
    def lse(self) -> Tensor:
        """Of every row."""
        return self.results["lse"] + self.doubt

    def counted(self, values: Tensor) -> Tensor:
        return torch.where(self.valid, values, 0.0)

    def reduced(self, losses: Tensor, reduction: str, zero: bool, by_weight: bool) -> Tensor:
        """The losses of the rows, reduced as the whole loss's. ``by_weight``: a mean divides by class weights."""
        if reduction not in _route.REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        losses = self.counted(losses) + self.doubt
        if reduction != "none":
            losses = losses.double()  # no number of threads changes the sum in float32
        of_class = self.of_class if by_weight else None
        s = self.sample_weight
        if s is not None:
            return reduced_by_weight(losses * s, s, self.kept, of_class, reduction, zero)
        divisor = self.kept.sum() if of_class is None else torch.where(self.kept, of_class, 0.0).sum()
        return reduced(losses, divisor, reduction, zero)


class Checked(NamedTuple):
    """A call whose arguments are checked as far as this rank knows."""

    function: str
    given: Given
    target: Tensor  # in int64
    ignore_index: int
    weight: Tensor | None  # of all classes
    sample_weight: Tensor | None
    kept: Tensor

    def agreed(self, logits: Tensor, heads: Tensor) -> Tensor:
        """Raises what all ranks raise once they have heard each other; what is in doubt of each row, 0 or NaN."""
        shard = self.given.shard
        looks = may_look(logits, shard)
        if looks:
            _shards.check(self.function, heads)
        if self.weight is not None and not same_shape(self.weight.shape, torch.Size([shard.total])):
            raise RuntimeError(
                f"weight tensor should be defined either for all {shard.total} classes or no classes but got weight "
                f"tensor of shape: {list(self.weight.shape)}"
            )
        doubt = _labels(logits, self.target, self.ignore_index, shard)
        if not looks:
            doubt = doubt + torch.where(_shards.agree(heads), 0.0, torch.nan).to(doubt.dtype)
        return doubt

    def rows(self, results: Sequence[Tensor], doubt: Tensor) -> Rows:
        given, weight = self.given, self.weight
        of_class = None if weight is None else weight[torch.where(given.valid, self.target, 0)]
        by_name = dict(zip(given.asked.results, results, strict=False))
        return Rows(by_name, given.valid, self.kept, of_class, self.sample_weight, doubt, given.shard.total)


def checked(
    function: str, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any,
    sample_weight: Tensor | None, asked: Asked, sharding: Sharding,
) -> Checked:  # fmt: skip
    """``logits``: those of this rank, or a tensor that is like them."""
    _check_tensors(function, logits, target, weight)
    shard = shard_of(function, logits.shape[class_dim(logits)], *sharding)
    target, ignore_index, sample_weight, kept, counts = _targets(
        function, logits, target, ignore_index, sample_weight, shard
    )
    weight = weight if weight is None else weight.to(arithmetic(logits))
    valid = counts & (target >= 0) & (target < shard.total)
    here = target - shard.start
    column = torch.where(valid & (here >= 0) & (here < shard.size), here, NOWHERE)
    seen = torch.where(counts, target, MASKED)
    given = Given(column, valid, seen, _of_shard(weight, shard), asked, shard)
    return Checked(function, given, target, ignore_index, weight, sample_weight, kept)


def rows(
    function: str, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any,
    sample_weight: Tensor | None, asked: Asked, sharding: Sharding,
) -> Rows:  # fmt: skip
    call = checked(function, logits, target, weight, ignore_index, sample_weight, asked, sharding)
    if not is_compiling() and _route.asked():
        _tell(logits, call.given)
    heads, *results = of_rows(logits, call.given)
    return call.rows(results, call.agreed(logits, heads))


class _Targets(NamedTuple):
    target: Tensor  # in int64
    ignore_index: int  # one
    sample_weight: Tensor | None  # in the logits' arithmetic
    kept: Tensor  # which rows are not ignored
    counts: Tensor  # which of them have a weight


def _targets(
    function: str, logits: Tensor, target: Tensor, ignore_index: Any, sample_weight: Tensor | None, shard: Shard
) -> _Targets:
    if type(ignore_index) is not int and not is_one(ignore_index):
        target, ignore_index, sample_weight = with_one_index(
            function, rows_of(logits), target, ignore_index, sample_weight
        )
    target = class_index(target)
    if target.dtype != torch.int64 or not same_shape(target.shape, rows_of(logits)):
        _refuse(logits, target, shard)
    kept = counts = target != ignore_index
    if sample_weight is not None:
        check(sample_weight, logits)
        sample_weight = sample_weight.to(arithmetic(logits))
        if not sample_weight.requires_grad:  # a weight of 0 has a derivative
            counts = kept & (sample_weight != 0)
    return _Targets(target, ignore_index, sample_weight, kept, counts)


def result_dtype(logits: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    return torch.float32 if logits.dtype in HALVES and widened(logits) else logits.dtype


def _check_tensors(function: str, logits: Any, target: Any, weight: Any) -> None:
    for name, tensor in (("input", logits), ("target", target), ("weight", weight)):
        if tensor is None and name == "weight":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
    refuse_dtensor(function, "input", logits, "its shard", "to_local")
    for name, tensor in (("target", target), ("weight", weight)):
        refuse_dtensor(function, name, tensor, "whole", "full_tensor")
    if logits.dim() < 1:
        raise ValueError(f"{function}: expected logits (C), (N, C) or (N, C, d1, ...), got a number")
    if not logits.is_floating_point():
        raise RuntimeError(f"{function}: expected logits of a floating point dtype, got {logits.dtype}")
    if target.is_floating_point():
        raise TypeError(f"{function}: expected class indices, got a target of {target.dtype}")
    if weight is not None and weight.requires_grad:
        raise RuntimeError(f"{function}: expected a weight that requires no gradient; pass weight.detach()")


def _refuse(logits: Tensor, target: Tensor, shard: Shard) -> None:
    """In torch's words, of a target whose shape or dtype no rank takes."""
    dim = class_dim(logits)
    sizes = [*logits.shape[:dim], shard.total, *logits.shape[dim + 1 :]]
    _torchs.nll_loss(logits.new_zeros((), dtype=arithmetic(logits)).expand(sizes), target)
    raise ValueError(
        f"expected a target of class indices of shape {tuple(rows_of(logits))} in int64 or uint8, got shape "
        f"{tuple(target.shape)} of {target.dtype}"
    )


def _of_shard(weight: Tensor | None, shard: Shard) -> Tensor | None:
    """The weights of this rank's classes; any where there are none, of which all ranks hear before they are used."""
    if weight is None:
        return None
    mine = weight.flatten()[max(shard.start, 0) : shard.start + shard.size]
    return mine if same_shape(mine.shape, torch.Size([shard.size])) else mine.new_ones(shard.size)


def _labels(logits: Tensor, target: Tensor, ignore_index: int, shard: Shard) -> Tensor:
    """0 for each row whose label names a class or is ignored. Any other raises torch's IndexError, on a GPU as for
    every loss: it is NaN, and a later call raises. A loss that reads no logits but these zeros."""
    zeros = logits.new_zeros(1, 1, dtype=arithmetic(logits)).expand(target.numel(), shard.total)
    flat = target.flatten()
    if extension is not None and logits.device.type in extension.devices:
        found, _ = torch.ops.fusedloss.nll.without_second(zeros, flat, None, NONE, ignore_index, [], False, None)
    else:
        found = _torchs.nll_loss(zeros, flat, ignore_index=ignore_index, reduction="none")
    return found.view(target.shape)


_looked: set[tuple[Shard, torch.device]] = set()


def may_look(logits: Tensor, shard: Shard) -> bool:
    """Whether the host may read what the ranks say: on a CPU always, elsewhere once for each way to cut the classes,
    because it waits for the device."""
    if is_compiling():
        return False
    if logits.device.type == "cpu":
        return True
    if (shard, logits.device) in _looked or (logits.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    _looked.add((shard, logits.device))
    return True


def place_of(shard: Shard, device: str) -> str:
    where = f"cpu {extension.cpu_isa()}" if device == "cpu" else device  # type: ignore[union-attr]
    return f"{where}, classes {shard.start} to {shard.start + shard.size} of {shard.total}"


def _tell(logits: Tensor, given: Given) -> None:
    why = _local.declines(logits, given.column, given.asked)
    if why is not None:
        _route.tell_native(why)
    shard, device = given.shard, logits.device.type
    where = place_of(given.shard, device)
    rows, size = given.column.numel(), arithmetic(logits).itemsize
    row_bytes = given.asked.numbers * size
    rounds = "an all_to_all and an all_gather" if _exchange.in_blocks(row_bytes, rows, shard.ranks) else "an all_gather"
    _route.tell(
        f"fused: {where}, {rounds} of {row_bytes * rows + _shards.HEAD * size} bytes from each of {shard.ranks} ranks"
    )
