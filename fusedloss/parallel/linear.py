"""Cross-entropy from hidden states and a head that is sharded over its classes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _captures, _route
from .._library import extension, why_native
from ..linear._chunks import count
from ..linear._route import Head, Options, declines_head, makes_gradients, under_autocast
from ..losses._dtensors import refuse_dtensor
from ..losses._ignored import IgnoreIndex
from ..losses._linear import Given as Operands
from ..losses._linear import (
    check_head,
    checked_divisor,
    checked_rows,
    flat_head,
    flat_rows,
    in_dtype,
    in_shape_of_rows,
    shifted,
    with_index,
)
from . import _exchange, _linear, _local, _work
from ._call import Checked, Rows, Sharding, checked, place_of, result_dtype
from ._local import NONE
from ._numbers import fixed
from ._rows import Given, of_rows
from .cross_entropy import Terms


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: IgnoreIndex | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: int = 0,
    normalizer: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    all_ignored: str = "nan",
    return_lse: bool = False,
    chunk_rows: int | None = None,
    grad_in_forward: bool | None = None,
    reduce_input_grad: bool = True,
) -> Any:
    """:func:`fusedloss.functional.linear_cross_entropy` of a head whose classes are spread over the ranks of a group.

    Every rank passes its own part of the head, and all else alike, and gets the whole loss, the same bits on every
    rank. Backward gives the gradient of its own part, and the whole gradient of the hidden states, for an upstream
    gradient that is the same on every rank. No rank ever has the logits of its classes, but for one chunk of rows.

    Where forward makes the gradients, the ranks exchange ten numbers each, and then for each chunk 3 numbers a row (4
    with smoothing) and an all_reduce of the chunk's gradient of the hidden states, which goes on during the next
    products. Otherwise forward exchanges the numbers of all rows at once, and backward makes the all_reduces.

    Args:
        input: hidden states, (D) or (..., D), whole and the same on every rank.
        linear_weight: this rank's part of the head, (C_local, D) or (C_local, d1, ..., dK, D), which may be of no
            class.
        linear_bias: that of the same classes.
        target: class indices of all classes.
        group, vocab_start, vocab_size: as for :func:`fusedloss.parallel.cross_entropy`.
        weight: a factor for each class of all ranks, whole on every rank.
        chunk_rows: None follows from the sizes of an even cut of the classes.
        reduce_input_grad: False leaves each rank its own part of the gradient of the hidden states, for a caller that
            sums them, as tensor parallelism does behind a column-parallel layer or by a reduce_scatter.

    The other arguments are those of :func:`fusedloss.functional.linear_cross_entropy`; ``logit_scale``, ``softcap`` and
    ``label_smoothing`` are numbers, and class probabilities are not taken. Second derivatives, :mod:`torch.func`,
    forward-mode derivatives and :func:`torch.compile` make this rank's logits whole.

    Raises:
        ValueError, IndexError, RuntimeError, TypeError: as :func:`fusedloss.parallel.cross_entropy` and
            :func:`fusedloss.functional.linear_cross_entropy`; before anything is computed where forward makes the
            gradients.
    """
    name = "linear_cross_entropy"
    given = Operands(input, linear_weight, linear_bias, target, ignore_index, sample_weight)
    for place, each, expected, remedy in (
        ("input", input, "whole", "full_tensor"),
        ("linear_weight", linear_weight, "its shard", "to_local"),
        ("linear_bias", linear_bias, "its shard", "to_local"),
    ):
        refuse_dtensor(name, place, each, expected, remedy)
    check_head(name, given)
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}(): argument 'target' must be Tensor, not {type(target).__name__}")
    if given.soft:
        raise TypeError(f"{name}: expected class indices, got a target of {target.dtype}")
    given = shifted(
        with_index(name, given._replace(ignore_index=-100 if ignore_index is None else ignore_index)), shift
    )
    terms = Terms.checked(name, label_smoothing, z_loss, softcap, all_ignored, out_dtype, return_lse)
    divisor, chunk_rows = checked_divisor(name, normalizer, reduction), checked_rows(chunk_rows)
    dtype = result_dtype(input, out_dtype)
    given, weight, _ = in_dtype(given, weight, out_dtype)
    head = under_autocast(flat_head(given, fixed(name, "logit_scale", logit_scale)))
    like = head.input.new_empty(()).expand(head.logits_shape)
    call = checked(
        name, like, flat_rows(given, given.target), weight, given.ignore_index, flat_rows(given, given.sample_weight),
        terms.asked, Sharding(group, vocab_start, vocab_size),
    )  # fmt: skip

    def reduced(row: Rows) -> Callable[[Tensor], Tensor]:
        kind = reduction if divisor is None else "sum"
        by_row = lambda losses: row.reduced(losses, kind, all_ignored == "zero", by_weight=True)  # noqa: E731
        return by_row if divisor is None else lambda losses: by_row(losses) / divisor

    why = _declines(head, like, call.given)
    if why is not None:
        _route.tell_native(why)
        loss, row = _through_logits(head, like, call, terms, reduced, reduce_input_grad)
    else:
        factors = (z_loss, divisor, sample_weight)
        in_forward = not any(isinstance(each, Tensor) and each.requires_grad for each in factors) and makes_gradients(
            _work.call_of(head, call.given, 0)._replace(reduction=_captures.REDUCTIONS.get(reduction, NONE)),
            Options(second=return_lse, grad_in_forward=grad_in_forward),
        )
        weighed = 0 if weight is None else weight.numel()
        work = _work.work(head, call.given, weighed, chunk_rows, reduce_input_grad, in_forward)
        call = call._replace(given=work.given)
        if _route.asked():
            _route.tell(_path(work, in_forward))
        step = _with_gradients if in_forward else _recomputed
        loss, row = step(work, like, call, terms, reduced)
    loss = loss.to(dtype)
    shaped = in_shape_of_rows(given, shift)
    if reduction == "none":
        loss = shaped(loss)
    return (loss, shaped(row.lse.to(dtype))) if return_lse else loss


Reduced = Callable[[Rows], Callable[[Tensor], Tensor]]


def _through_logits(
    head: Head, like: Tensor, call: Checked, terms: Terms, reduced: Reduced, sums_input: bool
) -> tuple[Tensor, Rows]:
    if sums_input:
        head = head._replace(input=_exchange.shared(head.input, call.given.shard))
    heads, *results = of_rows(head.logits(), call.given)
    row = call.rows(results, call.agreed(like, heads))
    return reduced(row)(terms.losses(row)), row


def _recomputed(
    work: _work.Work, like: Tensor, call: Checked, terms: Terms, reduced: Reduced
) -> tuple[Tensor, Rows]:  # fmt: skip
    heads, *results = _linear.Recomputed.apply(*work.call[:3], work)
    row = call.rows(results, call.agreed(like, heads))
    return reduced(row)(terms.losses(row)), row


def _with_gradients(
    work: _work.Work, like: Tensor, call: Checked, terms: Terms, reduced: Reduced
) -> tuple[Tensor, Rows]:  # fmt: skip
    heads = _exchange.gather(work.head(), call.given.shard)
    doubt = call.agreed(like, heads)
    blank = call.rows([], doubt)

    def whole(results: Sequence[Tensor]) -> Tensor:
        row = call.rows(results, doubt)
        return reduced(row)(terms.losses(row))

    def losses(index: Any, results: Sequence[Tensor]) -> Tensor:
        return terms.losses(blank.part(index, dict(zip(terms.asked.results, results, strict=True))))

    with torch.enable_grad():
        leaf = torch.zeros_like(doubt, dtype=torch.float64).requires_grad_()
        (coefficients,) = torch.autograd.grad(reduced(blank)(leaf), leaf)
    made = _linear.with_gradients(work, heads, coefficients, losses)
    loss = whole(made.results).detach()
    return _linear.Attached.apply(*work.call[:3], loss, work, made, whole), blank


def _declines(head: Head, like: Tensor, given: Given) -> str | None:
    """Why the chunks do not own a call, the same on every rank; None where they do."""
    if extension is None:
        return why_native
    if is_compiling():
        return "torch.compile"
    if why := declines_head(head, head.input.device):
        return why
    if not head.input.shape[0]:
        return "no rows"
    return _local.declines(like, given.column, given.asked) if like.shape[1] else None


def _path(work: _work.Work, in_forward: bool) -> str:
    call, given = work.call, work.given
    rows = call.input.shape[0]
    most = min(rows, call.chunk_rows)
    chunks = count(rows, most)
    plural = "s" if chunks > 1 else ""
    row_bytes = given.asked.numbers * call.arithmetic.itemsize * math.prod(given.column.shape[1:])
    exchanges = (
        f"{chunks} exchange{plural} of {row_bytes * most} bytes"
        if in_forward
        else (f"an exchange of {row_bytes * rows} bytes")
    )
    return (
        f"fused: {place_of(given.shard, call.input.device.type)}, {chunks} chunk{plural} of {most} rows, "
        f"{exchanges} from each of {given.shard.ranks} ranks"
    )
