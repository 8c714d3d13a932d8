"""What the ranks send each other, and its derivatives.

Every rank computes the same loss from what all have gathered, and differentiates it with the same upstream gradient. So
the gradient by its own part is its own part of the gradient, which needs no communication. The derivative of that, for
a backward that is itself differentiated, gathers what the ranks have of it.

Torch's functional collectives are ops of a graph, which :func:`torch.compile` keeps.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives  # noqa: F401  (defines the ops)
from torch import Tensor
from torch.compiler import is_compiling

from ._shards import Shard

# A round of a collective costs some 10 us before its first byte, in which a rank receives about 1 MB of another.
ROUND = 2**20


def received(row_bytes: int, rows: Any, ranks: int, blocks: bool) -> Any:
    """The bytes of all rows that a rank receives, where each rank sends ``row_bytes`` of each row.

    An all_gather brings every rank the numbers of all rows from all others. In blocks, an all_to_all brings a rank the
    numbers of one block of rows from all others, and an all_gather the combined numbers of the others' blocks.
    """
    if not blocks:
        return row_bytes * rows * (ranks - 1)
    return 2 * row_bytes * -(-rows // ranks) * (ranks - 1)


def in_blocks(row_bytes: int, rows: Any, ranks: int) -> Any:
    """Whether fewer bytes make up for a second round. Of 12 bytes a row, for 16384 rows from 9 ranks on."""
    saved = received(row_bytes, rows, ranks, False) - received(row_bytes, rows, ranks, True)
    return saved > ROUND


def swap(parts: Tensor, shard: Shard) -> Tensor:
    """Part i of (ranks, n) goes to rank i; what comes back is of every rank, in their order."""
    sizes = [parts.shape[1]] * shard.ranks
    sent = torch.ops._c10d_functional.all_to_all_single(parts.flatten(), sizes, sizes, shard.group)
    swapped: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return swapped.view(shard.ranks, -1)


def gather(part: Tensor, shard: Shard) -> Tensor:
    """The (n) numbers of every rank, in the order of ranks: (ranks, n)."""
    sent = torch.ops._c10d_functional.all_gather_into_tensor(part.contiguous(), shard.ranks, shard.group)
    gathered: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return gathered.view(shard.ranks, -1)


def start_sum(parts: Tensor, shard: Shard) -> None:
    """Begins to sum over the ranks, in place. The next :func:`arrived` of its memory waits for it."""
    torch.ops._c10d_functional.all_reduce_(parts, "sum", shard.group)


def arrived(parts: Tensor) -> Tensor:
    summed: Tensor = torch.ops._c10d_functional.wait_tensor(parts)
    return summed


def _sum(part: Tensor, shard: Shard) -> Tensor:
    return arrived(torch.ops._c10d_functional.all_reduce(part.contiguous(), "sum", shard.group))


def with_own(gathered: Tensor, part: Tensor, shard: Shard) -> Tensor:
    """What was gathered as a function of this rank's part."""
    return torch.cat([gathered[: shard.rank], part.unsqueeze(0), gathered[shard.rank + 1 :]])


class _AcrossRanks(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Shard], output: Tensor) -> None:
        _, ctx.shard = inputs


class Gathered(_AcrossRanks):
    @staticmethod
    def forward(part: Tensor, shard: Shard) -> Tensor:
        return gather(part, shard)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return _OwnPart.apply(upstream, ctx.shard), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return Gathered.apply(tangent, ctx.shard)


class _OwnPart(_AcrossRanks):
    @staticmethod
    def forward(whole: Tensor, shard: Shard) -> Tensor:
        return whole[shard.rank].clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return Gathered.apply(upstream, ctx.shard), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _OwnPart.apply(tangent, ctx.shard)


def shared(whole: Tensor, shard: Shard) -> Tensor:
    """What every rank has whole and uses for its own part: its gradient is the sum of theirs."""
    made: Tensor = (_SharedOnce if is_compiling() else _Shared).apply(whole, shard)
    return made


class _SharedOnce(torch.autograd.Function):
    """For a compiler, which differentiates once, and does not trace the derivatives of the next."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return _sum(upstream, ctx.shard), None


class _Shared(_AcrossRanks):
    @staticmethod
    def forward(whole: Tensor, shard: Shard) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return _Summed.apply(upstream, ctx.shard), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return tangent.view_as(tangent)


class _Summed(_AcrossRanks):
    @staticmethod
    def forward(part: Tensor, shard: Shard) -> Tensor:
        return _sum(part, shard)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return _Shared.apply(upstream, ctx.shard), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _Summed.apply(tangent, ctx.shard)
