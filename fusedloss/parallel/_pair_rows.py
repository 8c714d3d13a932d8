"""The divergences of the rows as a function of this rank's logits: a round of communication forward, a second one for a
mixture, and none backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._derivatives import needs_formula, transformed
from ..distillation import _route
from ..distillation._formula import Call, rows_kept
from . import _exchange, _pair, _shards
from ._pair import NUMBERS, Row
from ._shards import HEAD, Shard

Results = tuple[Tensor, Tensor]  # what the ranks say of themselves, and the divergences in float64


class Given(NamedTuple):
    """What the rows' numbers are made from, beside the tensors of a call."""

    seen: Tensor  # what must be the same on every rank
    shard: Shard
    function: str  # whose name an error has
    looks: bool  # whether the host may look at what the ranks say
    rest: tuple[Any, ...]  # of the call, behind its tensors


def of_rows(call: Call, given: Given) -> Results:
    """``call``: of rows (N, C) of this rank."""
    tensors = [each for each in call[:4] if each is not None]
    natively = transformed(tensors) or _differentiates_teacher(call)
    if natively or (is_compiling() and declines(call)):
        return _differentiable(call, given)
    results: Results = _Rows.apply(*call[:4], given)
    return results


def _differentiates_teacher(call: Call) -> bool:
    return torch.is_grad_enabled() and call.teacher.requires_grad


def declines(call: Call) -> str | None:
    weight = call.weight if call.weight is None else call.weight.detach()
    return _route.declines(call._replace(teacher=call.teacher.detach(), weight=weight))


def _message(numbers: Tensor, call: Call, given: Given) -> Tensor:
    head = _shards.head(given.shard, call.student.dtype, None, given.seen, numbers)
    return torch.cat([numbers.flatten(), head])


def _split(gathered: Tensor, call: Call, given: Given) -> tuple[Tensor, Tensor]:
    """The ranks' numbers (ranks, NUMBERS, rows) and their heads. What they do not agree about is raised on every rank,
    before another round that only some of them would take."""
    heads = gathered[:, -HEAD:].detach()
    if given.looks:
        _shards.check(given.function, heads)
    return gathered[:, :-HEAD].reshape(given.shard.ranks, NUMBERS, call.student.shape[0]), heads


def _differentiable(call: Call, given: Given) -> Results:
    """In PyTorch's operators, with derivatives of every order. The backward of a mixture communicates, and each after
    the first."""

    def gather(part: Tensor) -> Tensor:
        if is_compiling():  # which differentiates once, and does not trace the derivatives of Gathered
            return _exchange.with_own(_exchange.gather(part.detach(), given.shard), part, given.shard)
        gathered: Tensor = _exchange.Gathered.apply(part, given.shard)
        return gathered

    numbers = _pair.natively(call, call.computed)
    blocks, heads = _split(gather(_message(numbers, call, given)), call, given)
    row = _pair.combined(blocks, call)
    if call.direction == "jsd":
        sums = _exchange.shared(torch.stack([row.log_sum_q, row.log_sum_p]), given.shard)
        parts = _pair.mixed(call, row._replace(log_sum_q=sums[0], log_sum_p=sums[1]))
        value, constant = gather(parts.flatten()).view(given.shard.ranks, *parts.shape).sum(0)
        row = row._replace(value=value, constant=constant)
    return heads, row.value


class _Rows(torch.autograd.Function):
    """Where the kernels decline on one rank alone, as for a shard without classes, the others' collectives and its own
    are the same all the same."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, weight: Tensor | None, given: Given
    ) -> Results:
        call = Call(student, teacher, labels, weight, *given.rest)
        fused, dtype = declines(call) is None, call.computed
        kept = rows_kept(call)
        counted = kept if kept is None else kept.to(dtype)
        numbers = _pair.by_kernels(call, counted, dtype) if fused else _pair.natively(call, dtype)
        blocks, heads = _split(_exchange.gather(_message(numbers, call, given), given.shard), call, given)
        row = _pair.combined(blocks, call)
        if call.direction == "jsd":
            parts = _pair.mixed_in_blocks(call, row)
            value, constant = (
                _exchange.gather(parts.flatten(), given.shard).view(given.shard.ranks, *parts.shape).sum(0)
            )
            row = row._replace(value=value, constant=constant)
        ctx.save_for_backward(student, teacher, labels, weight, counted, *row)
        ctx.given, ctx.fused = given, fused
        ctx.mark_non_differentiable(heads)
        ctx.set_materialize_grads(False)
        return heads, row.value

    @staticmethod
    def backward(ctx: Any, _: Any, upstream: Tensor | None) -> Any:
        student, teacher, labels, weight, counted, *numbers = ctx.saved_tensors
        call, row = Call(student, teacher, labels, weight, *ctx.given.rest), Row(*numbers)
        made = None if upstream is None else _gradient(call, row, counted, ctx.given, ctx.fused, upstream)
        return made, None, None, None, None


def _gradient(call: Call, row: Row, counted: Tensor | None, given: Given, fused: bool, upstream: Tensor) -> Tensor:
    if not is_compiling() and needs_formula(upstream):  # on every rank, because it communicates
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            student = call.student.view_as(call.student)
            _, value = _differentiable(call._replace(student=student), given)
            (made,) = torch.autograd.grad(value, student, upstream, create_graph=create_graph)
        return made
    dtype = call.computed
    of_value = upstream.to(dtype)
    if fused:
        of_logits: Tensor = torch.ops.fusedloss.kl_divergence_backward(
            of_value, None, call.student, call.teacher, None, counted, row.statistics(dtype).flatten(),
            call.direction, call.teacher_is, "none", 0, float(call.temperature), float(call.beta),
        )  # fmt: skip
        return of_logits
    of_value = (of_value if counted is None else of_value * counted).unsqueeze(-1)
    made = torch.where(of_value == 0, 0.0, of_value * _pair.gradient(call, row, dtype))
    return made.to(call.student.dtype)
