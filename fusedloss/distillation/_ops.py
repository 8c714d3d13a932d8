"""The derivatives of the ops of csrc/torch/distillation.h, and what a tracer is told of them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _decomposed as _decompositions
from .._derivatives import needs_formula
from ._formula import Call, formula

_TENSORS = 4
_FIELDS = len(Call._fields)
_SAVED = 5  # kSavedOfPair


def run(call: Call, with_lse: bool, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The loss and the lse of rows (N, C)."""
    given = (*call, call.wide, with_lse, with_grad)
    if is_compiling():
        loss, lse, *_ = torch.ops.fusedloss.kl_divergence(*given)
        return loss, lse
    if torch.is_grad_enabled() and call.student.requires_grad:
        return _Divergence.apply(*given)  # type: ignore[no-any-return, no-untyped-call]
    loss, lse, *_ = _below_autograd(given)
    return loss, lse


def _below_autograd(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        made: tuple[Tensor, ...] = torch.ops.fusedloss.kl_divergence.default(*given)
        return made


class _Divergence(torch.autograd.Function):
    """The op of eager calls: what torch wraps around an op's derivatives takes 40 us more."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        made = _below_autograd(given)
        _save(ctx, given, made)
        return made[0], made[1]

    @staticmethod
    def backward(ctx: Any, *upstreams: Any) -> Any:
        return _backward(ctx, *upstreams)


# ---- without data, for tracing


def _fake(*given: Any) -> tuple[Tensor, ...]:
    call, (wide, with_lse, with_grad) = Call(*given[:_FIELDS]), given[_FIELDS:]
    student, rows, arithmetic = call.student, call.student.shape[0], call.computed
    result = arithmetic if wide else student.dtype
    return (
        student.new_empty((rows,) if call.reduction == "none" else (), dtype=result),
        student.new_empty(rows if with_lse else 0, dtype=result),
        student.new_empty(_SAVED * rows, dtype=arithmetic),
        torch.empty_like(student) if with_grad else student.new_empty(0),
    )


def _fake_backward(upstream: Tensor, upstream_lse: Tensor | None, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student)


# ---- derivatives


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _save(ctx, inputs, output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    statistics, grad = output[2:]
    ctx.save_for_backward(*(each for each in inputs[:_TENSORS] if each is not None), statistics)
    ctx.present = [each is not None for each in inputs[:_TENSORS]]
    ctx.rest = inputs[_TENSORS:_FIELDS]
    ctx.with_lse, ctx.with_grad = inputs[_FIELDS + 1 :]
    ctx.left = grad.detach() if ctx.with_grad else None  # an output that the node holds would hold the node
    ctx.rounds = inputs[0].dtype == torch.bfloat16 and inputs[0].device.type == "cpu"
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[Call, Tensor]:
    *tensors, statistics = ctx.saved_tensors
    left = iter(tensors)
    given: list[Any] = [next(left) if present else None for present in ctx.present]
    return Call(*given, *ctx.rest), statistics


def _backward(ctx: Any, upstream: Tensor | None, upstream_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    others = (None,) * (_FIELDS + 2)
    if not ctx.with_lse:
        upstream_lse = None
    if upstream is None and upstream_lse is None:
        return None, *others
    if needs_formula(upstream, upstream_lse):
        return _by_formula(_saved(ctx)[0], upstream, upstream_lse), *others
    if ctx.with_grad and (made := _scaled(ctx, upstream)) is not None:  # no lse, so an upstream gradient of the loss
        return made, *others
    call, statistics = _saved(ctx)
    if upstream is None:
        rows = call.student.shape[:1] if call.reduction == "none" else ()
        upstream = call.student.new_zeros(rows, dtype=call.computed)
    return torch.ops.fusedloss.kl_divergence_backward.default(
        upstream, upstream_lse, *call[:_TENSORS], statistics, *call[_TENSORS:]
    ), *others


def _scaled(ctx: Any, upstream: Any) -> Tensor | None:
    """What forward made, times the upstream gradient; None where backward makes it anew.

    A bfloat16 gradient times a number that is no power of two would be rounded twice. The first backward gives away
    what forward made, without a look at the saved tensors, and a later one makes it again in the same way, so that it
    gets the same bits.
    """
    if type(upstream) is not Tensor:  # traced: the graph may run many times
        made: Tensor = ctx.left
        return (made * upstream).to(made.dtype)
    if ctx.rounds and abs(math.frexp(upstream.item())[0]) != 0.5:
        return None
    left, ctx.left = ctx.left, None
    if left is None:
        left = torch.ops.fusedloss.kl_divergence.default(*_saved(ctx)[0], False, False, True)[3]
    torch.ops.fusedloss.scale_.default(left, upstream)
    return left


def _by_formula(call: Call, upstream: Tensor | None, upstream_lse: Tensor | None) -> Tensor:
    """By native autograd. Of a view, so that a teacher which was computed from the student does not count twice."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        student = call.student.view_as(call.student)
        results = formula(call._replace(student=student))
        pairs = [(r, u) for r, u in zip(results, (upstream, upstream_lse), strict=True) if u is not None]
        (made,) = torch.autograd.grad(
            [r for r, _ in pairs], [student], [u.to(r.dtype) for r, u in pairs], create_graph=create_graph
        )
    return made


def _refuse(ctx: Any, *upstreams: Any) -> Any:
    raise RuntimeError("derivative for fusedloss::kl_divergence_backward is not implemented")


def _decomposed(*given: Any) -> tuple[Tensor, ...]:
    """The op in PyTorch's own operators. What only its own backward reads is zeros."""
    call, (wide, with_lse, _) = Call(*given[:_FIELDS]), given[_FIELDS:]
    loss, lse = formula(call)
    result = call.computed if wide else call.student.dtype
    zeros = call.student.new_zeros
    return (
        loss.to(result),
        lse.to(result) if with_lse else zeros(0, dtype=result),
        zeros(_SAVED * call.student.shape[0], dtype=call.computed),
        zeros(0),
    )


def register() -> None:
    library = torch.library.Library("fusedloss", "FRAGMENT")
    _kept.append(library)
    torch.library.register_fake("fusedloss::kl_divergence", _fake, lib=library)
    torch.library.register_fake("fusedloss::kl_divergence_backward", _fake_backward, lib=library)
    torch.library.register_autograd("fusedloss::kl_divergence", _backward, setup_context=_keep, lib=library)
    torch.library.register_autograd("fusedloss::kl_divergence_backward", _refuse, lib=library)
    _decompositions.register(torch.ops.fusedloss.kl_divergence.default, _decomposed)


_kept: list[torch.library.Library] = []  # a library that is let go takes its ops with it
