"""The rows' numbers as a function of this rank's logits: one round of communication forward, none backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._derivatives import needs_formula, transformed
from . import _backward, _exchange, _local
from ._row import Asked, completed, merged
from ._shards import HEAD, Shard, head, masses


class Given(NamedTuple):
    """What a row's numbers are made from, beside the logits."""

    column: Tensor  # of the target among this rank's classes, or NOWHERE
    valid: Tensor  # which rows have a target
    seen: Tensor  # what must be the same on every rank: the targets, with one number for those that do not count
    weight: Tensor | None  # of this rank's classes, in the logits' arithmetic
    asked: Asked
    shard: Shard


Results = tuple[Tensor, ...]  # what the ranks say of themselves, and what is asked for
Upstreams = tuple[Tensor | None, ...]  # of what is asked for


def of_rows(logits: Tensor, given: Given) -> Results:
    # A compiler differentiates PyTorch's operators itself, once, and does not trace a call of autograd.
    if transformed([logits]) or (is_compiling() and _local.declines(logits, given.column, given.asked)):
        return _differentiable(logits, given)
    results: Results = _Rows.apply(logits, *given)
    return results


def _part(logits: Tensor, given: Given, numbers: Tensor) -> Tensor:
    """What this rank sends: the rows' numbers, and its head."""
    mass = None if given.weight is None else given.weight.sum()
    return torch.cat([numbers.flatten(), head(given.shard, logits.dtype, mass, given.seen, numbers)])


def _blocks(gathered: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    shape = (given.shard.ranks, given.asked.numbers, *given.column.shape)
    return gathered[:, :-HEAD].reshape(shape), gathered[:, -HEAD:]


def _together(blocks: Tensor, heads: Tensor, given: Given) -> tuple[Tensor, Results]:
    """The combined numbers, and the results."""
    numbers = merged(blocks, given.valid, given.asked, masses(heads))
    row = completed(numbers, given.asked, masses(heads).sum())
    return numbers, (heads, *[getattr(row, name) for name in given.asked.results])


def _differentiable(logits: Tensor, given: Given) -> Results:
    """In PyTorch's operators, with derivatives of every order; that of a backward communicates."""
    numbers = _local.natively(logits, given.column, given.weight, given.asked)
    part = _part(logits, given, numbers)
    if is_compiling():  # which differentiates once, and does not trace the derivatives of Gathered
        gathered = _exchange.with_own(_exchange.gather(part.detach(), given.shard), part, given.shard)
    else:
        gathered = _exchange.Gathered.apply(part, given.shard)
    blocks, heads = _blocks(gathered, given)
    return _together(blocks, heads.detach(), given)[1]


def _by_autograd(results: Results, logits: Tensor, upstream: Upstreams, create_graph: bool) -> Tensor:
    pairs = [(r, u) for r, u in zip(results[1:], upstream, strict=True) if u is not None]
    made = torch.autograd.grad([r for r, _ in pairs], logits, [u for _, u in pairs], create_graph=create_graph)
    return made[0]


class _Rows(torch.autograd.Function):
    """Where the kernels decline on one rank alone, as for a shard without classes, the others' collectives and its own
    are the same all the same."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *fields: Any) -> Results:
        given = Given(*fields)
        fused = _local.declines(logits, given.column, given.asked) is None
        if fused:
            numbers = _local.by_kernels(logits, given.column, given.valid, given.weight, given.asked)
        else:
            numbers = _local.natively(logits, given.column, given.weight, given.asked)
        blocks, heads = _blocks(_exchange.gather(_part(logits, given, numbers), given.shard), given)
        combined, results = _together(blocks, heads, given)
        # Natively, backward puts this rank's block, made anew, among those of the others.
        ctx.save_for_backward(logits, *given[:4], combined if fused else blocks, heads)
        ctx.rest = (given.asked, given.shard, fused)
        ctx.mark_non_differentiable(heads)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> Any:
        logits, column, valid, seen, weight, kept, heads = ctx.saved_tensors
        asked, shard, fused = ctx.rest
        given = Given(column, valid, seen, weight, asked, shard)
        return _gradient(logits, given, fused, kept, heads, upstreams[1:]), *[None] * len(Given._fields)


def _gradient(logits: Tensor, given: Given, fused: bool, kept: Tensor, heads: Tensor, upstream: Upstreams) -> Tensor:
    if all(each is None for each in upstream):
        return torch.zeros_like(logits)
    if not is_compiling() and needs_formula(*upstream):  # on every rank, because it communicates
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            logits = logits.view_as(logits)
            return _by_autograd(_differentiable(logits, given), logits, upstream, create_graph)
    if fused:
        mass = masses(heads).sum()
        return _backward.by_kernels(logits, given.column, given.valid, given.weight, given.asked, kept, mass, upstream)
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        numbers = _local.natively(logits, given.column, given.weight, given.asked)
        blocks = _exchange.with_own(kept, numbers, given.shard)
        return _by_autograd(_together(blocks, heads, given)[1], logits, upstream, False)
