"""Which classes a rank holds, and how the ranks find out that they do not agree.

A rank works out its own classes from the arguments, so that no round of communication comes before the losses'. What it
worked out travels with the rows' numbers, in a head of ten numbers, and every rank looks at the heads of all.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

HEAD = 10  # numbers
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = 2**20  # a size is sent as two numbers below this, which float32 holds exactly


class Shard(NamedTuple):
    """The classes of this rank: ``size`` from ``start`` on, of ``total``."""

    start: int
    size: int
    total: int
    rank: int
    ranks: int
    group: str  # by its name


def shard_of(function: str, size: int, group: Any, start: Any, total: Any) -> Shard:
    """Without a ``start``, classes are cut as :func:`torch.chunk` and DTensor's ``Shard`` cut them; without a ``total``
    too, every rank is taken to hold as many as this one."""
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise ValueError(f"{function}: expected an initialized torch.distributed, or a group")
    elif group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{function}: expected a group that this rank belongs to")
    elif not isinstance(group, dist.ProcessGroup):
        if not hasattr(group, "get_group"):
            raise TypeError(f"{function}: group must be a ProcessGroup or a DeviceMesh, not {type(group).__name__}")
        group = group.get_group()  # of a mesh of one dimension
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for name, value in (("vocab_start", start), ("vocab_size", total)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{function}: {name} must be an int, not {type(value).__name__}")
    if total is None:
        if start is not None:
            raise ValueError(f"{function}: vocab_start needs vocab_size, the number of classes of all ranks")
        return Shard(rank * size, size, ranks * size, rank, ranks, group.group_name)
    if start is None:
        start = min(rank * -(-total // ranks), total)
    return Shard(start, size, total, rank, ranks, group.group_name)


def head(shard: Shard, dtype: torch.dtype, mass: Tensor | None, target: Tensor, like: Tensor) -> Tensor:
    """What a rank says of itself: its classes, its dtype, a sum over its targets, the sum of its classes' weights."""
    fixed = _fixed if is_compiling() else _fixed_once
    of_shard = fixed(shard.start, shard.size, shard.total, dtype, like.dtype, like.device)
    place = torch.arange(1, target.numel() + 1, device=target.device)
    check = ((target.flatten() + 2) * (2 * place + 1)).sum()  # of other targets, or in another order, another number
    parts = torch.stack([check // _HALF % _HALF, check % _HALF]).to(like.dtype)
    return torch.cat([of_shard, parts, (of_shard[:1] * 0 + shard.size) if mass is None else mass.reshape(1)])


def _fixed(
    start: int, size: int, total: int, dtype: torch.dtype, sent: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    halves = [part for number in (start, size, total) for part in (number // _HALF, number % _HALF)]
    return torch.tensor([*halves, _DTYPES.index(dtype) if dtype in _DTYPES else -1], dtype=sent, device=device)


_fixed_once = lru_cache(maxsize=64)(_fixed)


def masses(heads: Tensor) -> Tensor:
    """The sum of the classes' weights on every rank, or the number of its classes."""
    return heads[:, -1]


def _numbers(heads: Tensor) -> Tensor:
    """(ranks, 5): start, size, total, dtype, and the sum over the targets."""
    whole = heads[:, :-1].long()
    pairs = torch.stack([whole[:, i] * _HALF + whole[:, i + 1] for i in (0, 2, 4, 7)], 1)
    return torch.cat([pairs[:, :3], whole[:, 6:7], pairs[:, 3:]], 1)


def agree(heads: Tensor) -> Tensor:
    """Whether all ranks speak of the same classes, dtype and targets: on the device, without waiting for it."""
    numbers = _numbers(heads)
    start, size, total = numbers[:, 0], numbers[:, 1], numbers[:, 2]
    end = size.cumsum(0)
    return (start == end - size).all() & (total == end[-1]).all() & (numbers[:, 3:] == numbers[:1, 3:]).all()


def check(function: str, heads: Tensor) -> None:
    """Where the host may look. Every rank looks at the same numbers and raises the same."""
    if bool(agree(heads)):
        return
    numbers = _numbers(heads).tolist()
    if len({each[3] for each in numbers}) > 1:
        named = ", ".join(str(_DTYPES[each[3]]) for each in numbers)
        raise ValueError(f"{function}: expected logits of one dtype on every rank, got {named}")
    shards = ", ".join(f"[{start}, {start + size}) of {total}" for start, size, total, *_ in numbers)
    end = 0
    for start, size, total, *_ in numbers:
        if start != end or total != sum(each[1] for each in numbers):
            raise ValueError(
                f"{function}: expected the ranks' classes to follow each other from 0 to the same vocab_size, got "
                f"{shards}; pass vocab_size, and vocab_start where shards are not cut as by torch.chunk"
            )
        end += size
    alike = _ALIKE.get(function, "target, ignore_index and sample_weight of 0")
    beside_a_head = "; and the same weight, chunk_rows and ways to make gradients" if "linear" in function else ""
    raise ValueError(f"{function}: expected the same {alike} on every rank{beside_a_head}")


_ALIKE = {
    "kl_divergence": "arguments, labels to ignore and weights of 0, and teachers of the students' classes and dtype,"
}
