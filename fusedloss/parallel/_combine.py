"""From each rank's numbers of the rows to the combined ones, which every rank has to the same bits."""

from typing import Any

import torch
from torch import Tensor

from . import _exchange
from ._row import Asked, merged, seen_from
from ._shards import HEAD, Shard, masses


def is_in_blocks(numbers: Tensor, shard: Shard) -> Any:
    return _exchange.in_blocks(numbers.shape[0] * numbers.element_size(), numbers[0].numel(), shard.ranks)


def combined(numbers: Tensor, head: Tensor, valid: Tensor, asked: Asked, shard: Shard) -> tuple[Tensor, Tensor]:
    """The (numbers, rows) of all ranks as one, and their heads (ranks, HEAD)."""
    together = _by_blocks if is_in_blocks(numbers, shard) else _at_once
    return together(numbers, head, valid, asked, shard)


def _at_once(numbers: Tensor, head: Tensor, valid: Tensor, asked: Asked, shard: Shard) -> tuple[Tensor, Tensor]:
    gathered = _exchange.gather(torch.cat([numbers.flatten(), head]), shard)
    blocks, heads = split(gathered, numbers.shape)
    return merged(blocks, valid, asked, masses(heads)), heads


def split(gathered: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Of every rank its numbers and its head."""
    return gathered[:, :-HEAD].reshape(gathered.shape[0], *shape), gathered[:, -HEAD:]


def _by_blocks(numbers: Tensor, head: Tensor, valid: Tensor, asked: Asked, shard: Shard) -> tuple[Tensor, Tensor]:
    """Each rank combines a block of rows; the last ones are filled with rows that have no target."""
    kinds, ranks, rows = numbers.shape[0], shard.ranks, valid.numel()
    each = -(-rows // ranks)
    filled = torch.nn.functional.pad(numbers.view(kinds, rows), (0, each * ranks - rows))
    parts = filled.view(kinds, ranks, each).transpose(0, 1).reshape(ranks, -1)
    swapped = _exchange.swap(torch.cat([parts, head.expand(ranks, HEAD)], 1), shard)
    blocks, heads = split(swapped, torch.Size([kinds, each]))
    targets = torch.nn.functional.pad(valid.flatten(), (0, each * ranks - rows)).view(ranks, each)
    block = merged(blocks, targets[shard.rank], asked, masses(heads))
    whole = _exchange.gather(block.flatten(), shard).view(ranks, kinds, each).transpose(0, 1)
    return whole.reshape(kinds, ranks * each)[:, :rows].view(numbers.shape), heads


class _ValueOf(torch.autograd.Function):
    """The first tensor as if it had been computed from the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return None, upstream


def of_own(combined: Tensor, numbers: Tensor, mass: Tensor, asked: Asked) -> Tensor:
    """The combined numbers as a function of this rank's own, for its derivative."""
    seen = seen_from(combined[0], numbers, mass, asked)
    sums = [_ValueOf.apply(value, own) for value, own in zip(combined[1:], seen, strict=True)]
    return torch.stack([combined[0], *sums])
