"""The rows' numbers as a function of this rank's logits: one round of communication forward, none backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._derivatives import needs_formula, transformed
from . import _backward, _combine, _exchange, _local
from ._row import Asked, completed, merged
from ._shards import Shard, head, masses


class Given(NamedTuple):
    """What a row's numbers are made from, beside the logits."""

    column: Tensor  # of the target among this rank's classes, or NOWHERE
    valid: Tensor  # which rows have a target
    seen: Tensor  # what must be the same on every rank: the targets, with one number for those that do not count
    weight: Tensor | None  # of this rank's classes, in the logits' arithmetic
    asked: Asked
    shard: Shard

    def of(self, index: Any) -> "Given":
        """Of some rows."""
        return self._replace(column=self.column[index], valid=self.valid[index])


Results = tuple[Tensor, ...]  # what the ranks say of themselves, and what is asked for
Upstreams = tuple[Tensor | None, ...]  # of what is asked for


def of_rows(logits: Tensor, given: Given) -> Results:
    # A compiler differentiates PyTorch's operators itself, once, and does not trace a call of autograd.
    if transformed([logits]) or (is_compiling() and _local.declines(logits, given.column, given.asked)):
        return differentiable(logits, given)
    results: Results = _Rows.apply(logits, *given)
    return results


def head_of(dtype: torch.dtype, given: Given, like: Tensor) -> Tensor:
    """``dtype``: of the logits. ``like``: the numbers that are sent with it."""
    mass = None if given.weight is None else given.weight.sum()
    return head(given.shard, dtype, mass, given.seen, like)


def results_of(numbers: Tensor, heads: Tensor, given: Given) -> Results:
    """From the combined numbers."""
    row = completed(numbers, given.asked, masses(heads).sum())
    return heads, *[getattr(row, name) for name in given.asked.results]


def differentiable(logits: Tensor, given: Given) -> Results:
    """In PyTorch's operators, with derivatives of every order; that of a backward communicates."""
    numbers = _local.natively(logits, given.column, given.weight, given.asked)
    part = torch.cat([numbers.flatten(), head_of(logits.dtype, given, numbers)])
    if is_compiling():  # which differentiates once, and does not trace the derivatives of Gathered
        gathered = _exchange.with_own(_exchange.gather(part.detach(), given.shard), part, given.shard)
    else:
        gathered = _exchange.Gathered.apply(part, given.shard)
    blocks, heads = _combine.split(gathered, numbers.shape)
    heads = heads.detach()
    return results_of(merged(blocks, given.valid, given.asked, masses(heads)), heads, given)


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
        numbers, heads = _combine.combined(
            numbers, head_of(logits.dtype, given, numbers), given.valid, given.asked, given.shard
        )
        results = results_of(numbers, heads, given)
        ctx.save_for_backward(logits, *given[:4], numbers, heads)
        ctx.rest = (given.asked, given.shard, fused)
        ctx.mark_non_differentiable(heads)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> Any:
        logits, column, valid, seen, weight, numbers, heads = ctx.saved_tensors
        asked, shard, fused = ctx.rest
        given = Given(column, valid, seen, weight, asked, shard)
        return _gradient(logits, given, fused, numbers, heads, upstreams[1:]), *[None] * len(Given._fields)


def _gradient(
    logits: Tensor, given: Given, fused: bool, numbers: Tensor, heads: Tensor, upstream: Upstreams
) -> Tensor:  # fmt: skip
    """``numbers``: the combined ones."""
    if all(each is None for each in upstream):
        return torch.zeros_like(logits)
    if not is_compiling() and needs_formula(*upstream):  # on every rank, because it communicates
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            logits = logits.view_as(logits)
            return _by_autograd(differentiable(logits, given), logits, upstream, create_graph)
    if fused:
        mass = masses(heads).sum()
        return _backward.by_kernels(
            logits, given.column, given.valid, given.weight, given.asked, numbers, mass, upstream
        )
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        own = _local.natively(logits, given.column, given.weight, given.asked)
        numbers = _combine.of_own(numbers, own, masses(heads)[given.shard.rank], given.asked)
        return _by_autograd(results_of(numbers, heads, given), logits, upstream, False)
