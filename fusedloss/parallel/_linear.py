"""The passes of :mod:`fusedloss.linear` over a head that is sharded over its classes.

Each rank makes its logits of a chunk of rows in one buffer, and the chunk's gradient over them. Between the two the
ranks combine their numbers of the rows. What a rank has of the gradient of the input is summed over the ranks, chunk by
chunk, while the head's gradient and the next chunk are computed. The sum waits on nothing but the chunk before; the
numbers, 12 bytes a row, are waited for at once, because a second buffer would cost more than that wait.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._derivatives import needs_formula
from .._sizes import is_empty
from ..linear._call import NONE, Call
from ..linear._chunks import rule
from ..linear._gradients import Gradients
from ..linear._ops import no_autocast, scaled
from ..linear._passes import Logits
from ..linear._route import Head
from ..linear._rows import Chunk, Rows
from ..linear._scale import OF_HALF, Scale
from . import _backward, _combine, _exchange, _local
from ._local import NOWHERE
from ._row import Asked
from ._rows import Given, differentiable, head_of, results_of
from ._shards import Shard, masses


class Work(NamedTuple):
    """A loss over this rank's part of a head."""

    call: Call  # its target: the columns
    given: Given
    sums_input: bool  # whether the gradient of the input is that of all ranks

    def rows(self, sums: bool = False) -> Rows:
        return Rows(self.call, self.given.asked.every_lse, sums, kept=self.given.valid)

    def sums(self, rows: Rows, scale: Scale, wanted: list[bool]) -> "_Sums":
        return _Sums(self.call, wanted, len(rows.bounds()), scale, self.given.shard if self.sums_input else None)

    def head(self) -> Tensor:
        return head_of(self.call.input.dtype, self.given, self.blank(0))

    def blank(self, *sizes: int) -> Tensor:
        return self.call.input.new_zeros(sizes, dtype=self.call.arithmetic)

    def without_operands(self) -> "Work":
        """For a context, which saves them as autograd asks it to."""
        nothing = self.call.input.new_empty(0).detach()
        return self._replace(call=self.call._replace(input=nothing, linear_weight=nothing, linear_bias=None))

    def results(self, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, ...]:
        """Through the logits of this rank: with derivatives of every order, which communicate."""
        if self.sums_input:
            input = _exchange.shared(input, self.given.shard)
        rows, *positions = self.given.column.shape
        shape = (rows, linear_weight.shape[0] // max(1, math.prod(positions)), *positions)
        return differentiable(
            Head(input, linear_weight, linear_bias, shape, self.call.logit_scale).logits(), self.given
        )


def work(
    head: Head, given: Given, classes_weighed: int, chunk_rows: int | None, sums_input: bool, in_forward: bool
) -> Work:  # fmt: skip
    """With a number of rows of a chunk that is the same on every rank, as if the classes were cut evenly."""
    shard, (rows, features) = given.shard, head.input.shape
    columns = max(1, -(-shard.total // shard.ranks)) * math.prod(head.logits_shape[2:])
    summed = features if head.linear_weight.requires_grad else 0
    step = chunk_rows or rule(rows, columns, summed, head.input.dtype, head.input.device.type)
    # What the order of the collectives depends on is told the other ranks, as a target is.
    plan = classes_weighed * 2**32 + step * 8 + 4 * in_forward + 2 * sums_input + head.input.requires_grad
    seen = torch.cat([given.seen.flatten(), given.seen.new_full((1,), plan)])
    return Work(call_of(head, given, step), given._replace(seen=seen), sums_input)


def call_of(head: Head, given: Given, chunk_rows: int) -> Call:
    return Call(
        head.input, head.linear_weight, head.linear_bias, given.column, None, None, None, "cross_entropy", NONE,
        NOWHERE, [0.0, 0.0, given.asked.softcap], float(head.logit_scale), chunk_rows, True, False,
    )  # fmt: skip


class _Sums(Gradients):
    """Gradients, of which that of the input is summed over the ranks of ``shard``, one chunk at a time."""

    def __init__(self, call: Call, wanted: list[bool], chunks: int, scale: Scale, shard: Shard | None) -> None:
        super().__init__(call, wanted, chunks, scale)
        self.shard = shard
        self.sent: tuple[Chunk, Tensor] | None = None

    def _add_to_input(self, of_input: Tensor, chunk: Chunk, of_logits: Tensor) -> None:
        super()._add_to_input(of_input, chunk, of_logits)
        if self.shard is not None:
            self._receive(of_input)
            parts = of_input[chunk.index]
            _exchange.start_sum(parts, self.shard)
            self.sent = chunk, parts

    def _receive(self, of_input: Tensor) -> None:
        if self.sent is None:
            return
        chunk, parts = self.sent
        _exchange.arrived(parts)
        if not isinstance(chunk.index, slice):  # a slice is a view
            chunk.put(of_input, parts)
        self.sent = None

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.of_input is not None:
            self._receive(self.of_input)
        return super().finish()


def _numbers_of(logits: Tensor, given: Given) -> Tensor:
    if is_empty(logits):  # of a rank without classes
        return _local.natively(logits, given.column, given.weight, given.asked)
    return _local.by_kernels(logits, given.column, given.valid, given.weight, given.asked)


def _to_gradient(
    logits: Tensor, given: Given, numbers: Tensor, mass: Tensor, upstreams: Sequence[Tensor | None]
) -> None:
    if not is_empty(logits):
        _backward.by_kernels(
            logits, given.column, given.valid, given.weight, given.asked, numbers, mass, upstreams, in_place=True
        )


def _scale_of(call: Call, largest: Tensor) -> tuple[Scale, Tensor]:
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


def _upstream(work: Work, of_results: Sequence[Tensor | None], mass: Tensor) -> Upstream:
    scale, divisor = _scale_of(work.call, _largest(work.given.asked, of_results, mass))
    return Upstream([each if each is None else each.to(divisor.dtype) / divisor for each in of_results], scale)


def gradients(
    work: Work, numbers: Tensor, mass: Tensor, upstream: Upstream, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes the logits again. ``numbers``: the combined ones."""
    rows = work.rows(wanted[1])
    sums = work.sums(rows, upstream.scale, wanted)
    logits = Logits(work.call, rows)
    for chunk in rows.chunks():
        flat, seen = logits.of(chunk)
        of_chunk = [each if each is None else each[chunk.index] for each in upstream.of_results]
        _to_gradient(seen, work.given.of(chunk.index), numbers[:, chunk.index], mass, of_chunk)
        sums.add(chunk, flat)
    return sums.finish()


class Recomputed(torch.autograd.Function):
    """The rows' numbers, in one exchange of all of them; backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, work: Work) -> Any:
        given = work.given
        numbers = work.blank(given.asked.numbers, *given.column.shape)
        with no_autocast(work.call):
            rows = work.rows()
            logits = Logits(work.call, rows)
            for chunk in rows.chunks():
                numbers[:, chunk.index] = _numbers_of(logits.of(chunk)[1], given.of(chunk.index))
        numbers, heads = _combine.combined(numbers, work.head(), given.valid, given.asked, given.shard)
        ctx.save_for_backward(input, linear_weight, linear_bias, numbers, heads)
        ctx.work = work.without_operands()
        ctx.mark_non_differentiable(heads)
        ctx.set_materialize_grads(False)
        return results_of(numbers, heads, given)

    @staticmethod
    def backward(ctx: Any, _: None, *upstreams: Tensor | None) -> Any:
        *operands, numbers, heads = ctx.saved_tensors
        if all(each is None for each in upstreams):
            return None, None, None, None
        work = _with_operands(ctx.work, operands)
        wanted = list(ctx.needs_input_grad[:3])
        if needs_formula(*upstreams):
            return *_by_autograd(lambda *head: work.results(*head)[1:], operands, wanted, upstreams), None
        with no_autocast(work.call):
            mass = masses(heads).sum()
            made = gradients(work, numbers, mass, _upstream(work, upstreams, mass), wanted)
        return *(each if want else None for each, want in zip(made, wanted, strict=True)), None


def _with_operands(work: Work, operands: Sequence[Any]) -> Work:
    input, linear_weight, linear_bias = operands
    call = work.call._replace(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    return work._replace(call=call)


def _by_autograd(
    results: Callable[..., Sequence[Tensor]],
    operands: Sequence[Any],
    wanted: list[bool],
    upstreams: Sequence[Tensor | None],
) -> list[Tensor | None]:
    create_graph = torch.is_grad_enabled()
    views: list[Any]
    with torch.enable_grad():
        views = [each if each is None else each.view_as(each) for each in operands]
        inputs = [each for each, want in zip(views, wanted, strict=True) if want]
        pairs = [(r, u) for r, u in zip(results(*views), upstreams, strict=True) if u is not None]
        made = iter(
            torch.autograd.grad([r for r, _ in pairs], inputs, [u for _, u in pairs], create_graph=create_graph)
        )
    return [next(made) if want else None for want in wanted]


class Made(NamedTuple):
    """What forward has made for a loss that is one number."""

    results: list[Tensor]  # of the rows
    numbers: Tensor  # the combined ones
    mass: Tensor
    upstream: Upstream  # for an upstream gradient of 1
    gradients: tuple[Tensor, Tensor, Tensor]  # for the same


@torch.no_grad()
def with_gradients(
    work: Work, heads: Tensor, coefficients: Tensor, losses: Callable[[Any, list[Tensor]], Tensor]
) -> Made:
    """The rows' results and the gradients of the sum of the losses times ``coefficients``, exchanging chunk by chunk.

    ``losses(index, results)``: those of some rows.
    """
    call, given = work.call, work.given
    mass = masses(heads).sum()
    wanted = call.wanted
    rows = work.rows(wanted[1])
    scale, divisor = _scale_of(call, coefficients.abs().max() if coefficients.numel() else mass)
    coefficients = (coefficients / divisor).to(call.arithmetic)
    sums = work.sums(rows, scale, wanted)
    head = work.head()
    numbers = work.blank(given.asked.numbers, *given.column.shape)
    results = [work.blank(*given.column.shape) for _ in given.asked.results]
    upstreams = [work.blank(*given.column.shape) for _ in given.asked.results]
    logits = Logits(call, rows)
    with no_autocast(call):
        for chunk in rows.chunks():
            flat, seen = logits.of(chunk)
            part = given.of(chunk.index)
            own, _ = _combine.combined(_numbers_of(seen, part), head, part.valid, part.asked, part.shard)
            numbers[:, chunk.index] = own
            _, *of_chunk = results_of(own, heads, part)
            up = _upstreams(losses, chunk, of_chunk, coefficients[chunk.index])
            for place, (result, upstream) in enumerate(zip(of_chunk, up, strict=True)):
                results[place][chunk.index] = result
                upstreams[place][chunk.index] = upstream
            _to_gradient(seen, part, own, mass, up)
            sums.add(chunk, flat)
        made = sums.finish()
    return Made(results, numbers, mass, Upstream(upstreams, scale), made)


def _upstreams(
    losses: Callable[[Any, list[Tensor]], Tensor], chunk: Chunk, results: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in results]
        return list(torch.autograd.grad(losses(chunk.index, leaves), leaves, coefficients))


class Attached(torch.autograd.Function):
    """The loss with the gradients that forward has made. The first backward gives them away."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, loss: Tensor, work: Work,
        made: Made, whole: Callable[[Sequence[Tensor]], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(input, linear_weight, linear_bias, made.numbers, made.mass, *made.upstream.of_results)
        ctx.work, ctx.left, ctx.whole, ctx.scale = work.without_operands(), made.gradients, whole, made.upstream.scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        *operands, numbers, mass = ctx.saved_tensors[:5]
        of_results = ctx.saved_tensors[5:]
        work = _with_operands(ctx.work, operands)
        wanted = list(ctx.needs_input_grad[:3])
        if needs_formula(upstream):
            by_results = lambda *head: [ctx.whole(work.results(*head)[1:])]  # noqa: E731
            return *_by_autograd(by_results, operands, wanted, [upstream]), None, None, None, None
        left, ctx.left = ctx.left, None
        if left is None:
            with no_autocast(work.call):
                left = gradients(work, numbers, mass, Upstream(of_results, ctx.scale), wanted)
        made = (scaled(each, upstream) if want else None for each, want in zip(left, wanted, strict=True))
        return *made, None, None, None, None
