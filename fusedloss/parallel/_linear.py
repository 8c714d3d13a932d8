"""The passes of :mod:`fusedloss.linear` over a head that is sharded over its classes.

Each rank makes its logits of a chunk of rows in one buffer, and the chunk's gradient over them. Between the two the
ranks combine their numbers of the rows. What a rank has of the gradient of the input is summed over the ranks, chunk by
chunk, while the head's gradient and the next chunk are computed. The sum waits on nothing but the chunk before; the
numbers, 12 bytes a row, are waited for at once, because a second buffer would cost more than that wait.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._derivatives import needs_formula
from .._sizes import is_empty
from ..linear._ops import no_autocast, scaled
from ..linear._passes import Logits
from ..linear._rows import Chunk
from . import _backward, _combine, _local
from ._rows import Given, results_of
from ._shards import masses
from ._upstream import Upstream, scale_of, upstream_of
from ._work import Work


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
            made = gradients(work, numbers, mass, upstream_of(work.call, work.given.asked, upstreams, mass), wanted)
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
    scale, divisor = scale_of(call, coefficients.abs().max() if coefficients.numel() else mass)
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
