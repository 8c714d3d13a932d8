"""The passes as ops of torch, which graphs hold as they are, and their derivatives."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _decomposed as _decompositions
from .._derivatives import needs_formula
from . import _passes
from ._call import NONE, Call
from ._kept import size

_CALL = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor? sample_weight, "
    "Tensor? normalizer, str loss, int reduction, int ignore_index, float[] params, float logit_scale, int chunk_rows, "
    "bool wide, bool by_classes"
)
_SCHEMAS = {
    "linear": f"({_CALL}, bool second, bool correct, bool keep, bool grad_input) "
    "-> (Tensor loss, Tensor second, Tensor correct, Tensor kept, Tensor grad_input)",
    "linear_with_grad": f"({_CALL}, bool[3] wanted, bool correct) "
    "-> (Tensor loss, Tensor correct, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    "linear_backward": f"(Tensor upstream, Tensor? upstream_second, {_CALL}, bool second, Tensor kept, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
}
_FIELDS = len(Call._fields)
_TENSORS = 7

# formula(call, second, correct)(input, linear_weight, linear_bias): the loss, the second result, which rows are right
Formula = Callable[[Call, bool, bool], Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]]


def _linear(*given: Any) -> tuple[Tensor, ...]:
    call = Call(*given[:_FIELDS])
    with no_autocast(call):
        return _passes.forward(call, *given[_FIELDS:])


def _linear_with_grad(*given: Any) -> tuple[Tensor, ...]:
    call = Call(*given[:_FIELDS])
    with no_autocast(call):
        return _passes.forward_with_gradients(call, *given[_FIELDS:])


def _linear_backward(upstream: Tensor, upstream_second: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    call = Call(*given[:_FIELDS])
    with no_autocast(call):
        return _passes.backward(upstream, upstream_second, call, *given[_FIELDS:])


def no_autocast(call: Call) -> AbstractContextManager[Any]:
    """The operands have their dtypes by now. A backward may run under autocast, which would round its products."""
    device = call.input.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# ---- without data, for tracing


def _empty_loss(call: Call) -> Tensor:
    return call.input.new_empty(call.row_shape if call.reduction == NONE else (), dtype=call.result)


def _empty_gradients(call: Call, wanted: list[bool]) -> tuple[Tensor, ...]:
    like = (call.input, call.linear_weight, call.linear_bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if want and tensor is not None
        else call.input.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    )


def _fake_linear(*given: Any) -> tuple[Tensor, ...]:
    call, (second, correct, keep, grad_input) = Call(*given[:_FIELDS]), given[_FIELDS:]
    new = call.input.new_empty
    return (
        _empty_loss(call),
        new(call.row_shape if second else 0, dtype=call.result),
        new(call.row_shape if correct else 0, dtype=call.arithmetic),
        new(size(call) if keep else 0, dtype=call.arithmetic),
        new(call.input.shape if grad_input else 0),
    )


def _fake_with_grad(*given: Any) -> tuple[Tensor, ...]:
    call, (wanted, correct) = Call(*given[:_FIELDS]), given[_FIELDS:]
    right = call.input.new_empty(call.row_shape if correct else 0, dtype=call.arithmetic)
    return _empty_loss(call), right, *_empty_gradients(call, wanted)


def _fake_backward(upstream: Tensor, upstream_second: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(Call(*given[:_FIELDS]), given[-1])


# ---- derivatives


def _none_for(op_arguments: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return (*gradients, *[None] * (op_arguments - len(gradients)))


def _save(ctx: Any, given: tuple[Any, ...], *made: Tensor) -> None:
    ctx.save_for_backward(*(each for each in given[:_TENSORS] if each is not None), *made)
    ctx.present = [each is not None for each in given[:_TENSORS]]
    ctx.rest = given[_TENSORS:_FIELDS]
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[Call, list[Tensor]]:
    tensors = iter(ctx.saved_tensors)
    given: list[Any] = [next(tensors) if present else None for present in ctx.present]
    return Call(*given, *ctx.rest), list(tensors)


def _by_formula(formula: Formula, call: Call, second: bool, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
    """By native autograd. Of views, so that a target which was computed from the input does not count twice."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [each if each is None else each.view_as(each) for each in call[:3]]
        results = formula(call, second, False)(*tensors)
        inputs = [each for each, want in zip(tensors, call.wanted, strict=True) if want and each is not None]
        pairs = [(r, u) for r, u in zip(results, upstreams, strict=False) if r is not None and u is not None]
        made = torch.autograd.grad([r for r, _ in pairs], inputs, [u for _, u in pairs], create_graph=create_graph)
    grads = iter(made)
    return tuple(next(grads) if want else None for want in call.wanted)


def _decomposed(formula: Formula) -> Callable[..., tuple[Tensor, ...]]:
    """The op in PyTorch's own operators. What only its own backward reads is zeros."""

    def decomposed(*given: Any) -> tuple[Tensor, ...]:
        call, (second, correct, keep, _) = Call(*given[:_FIELDS]), given[_FIELDS:]
        results = formula(call, second, correct)(*call[:3])
        new = call.input.new_zeros
        nothing = (new(0), new(0, dtype=call.result), new(0, dtype=call.arithmetic))
        wanted = (each if each is not None else empty for each, empty in zip(results, nothing, strict=True))
        return *wanted, new(size(call) if keep else 0, dtype=call.arithmetic), new(0)

    return decomposed


def register(formula: Formula) -> None:
    library = torch.library.Library("fusedloss", "FRAGMENT")
    _kept.append(library)
    kernels = {"linear": _linear, "linear_with_grad": _linear_with_grad, "linear_backward": _linear_backward}
    fakes = {"linear": _fake_linear, "linear_with_grad": _fake_with_grad, "linear_backward": _fake_backward}
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, kernels[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedloss::{name}", fakes[name], lib=library)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output[3])
        ctx.second, *_, ctx.grad_input = inputs[_FIELDS:]
        # Detached: an output that the node holds would hold the node.
        ctx.left = output[4].detach() if ctx.grad_input else None

    def backward(ctx: Any, upstream: Tensor | None, upstream_second: Tensor | None, *_: Any) -> Any:
        call, (kept,) = _saved(ctx)
        arguments, wanted = _FIELDS + 4, call.wanted
        if not ctx.second:
            upstream_second = None
        if upstream is None and upstream_second is None:
            return _none_for(arguments, ())
        if needs_formula(upstream, upstream_second):
            return _none_for(arguments, _by_formula(formula, call, ctx.second, [upstream, upstream_second]))
        if upstream is None:
            upstream = call.input.new_zeros(call.row_shape if call.reduction == NONE else (), dtype=call.result)
        of_input = None
        if ctx.grad_input and wanted[0]:
            of_input = scaled(_taken(ctx, upstream, lambda: _linear_again(call)), upstream)
            wanted = [False, *wanted[1:]]
        made = _only(
            torch.ops.fusedloss.linear_backward(upstream, upstream_second, *call, ctx.second, kept, wanted), wanted
        )
        return _none_for(arguments, (of_input, *made[1:]) if of_input is not None else made)

    def leave(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)
        ctx.left = [each.detach() for each in output[2:]]

    def scale(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        call, _nothing = _saved(ctx)
        arguments, wanted = _FIELDS + 2, call.wanted
        if upstream is None:
            return _none_for(arguments, ())
        if needs_formula(upstream):
            return _none_for(arguments, _by_formula(formula, call, False, [upstream]))
        left = _taken(ctx, upstream, lambda: torch.ops.fusedloss.linear_with_grad(*call, wanted, False)[2:])
        made = _only(left, wanted)
        del left
        return _none_for(arguments, tuple(each if each is None else scaled(each, upstream) for each in made))

    def refuse(ctx: Any, *upstreams: Any) -> Any:
        raise RuntimeError("derivative for fusedloss::linear_backward is not implemented")

    torch.library.register_autograd("fusedloss::linear_backward", refuse, lib=library)
    torch.library.register_autograd("fusedloss::linear", backward, setup_context=keep, lib=library)
    torch.library.register_autograd("fusedloss::linear_with_grad", scale, setup_context=leave, lib=library)
    _decompositions.register(torch.ops.fusedloss.linear.default, _decomposed(formula))


def _linear_again(call: Call) -> Tensor:
    of_input: Tensor = torch.ops.fusedloss.linear(*call, False, False, False, True)[4]
    return of_input


def _taken(ctx: Any, upstream: Tensor, make: Callable[[], Any]) -> Any:
    """What forward made. The first backward gives it away, and a later one makes it again."""
    if _is_traced(upstream):
        return ctx.left
    left, ctx.left = ctx.left, None
    return make() if left is None else left


def scaled(made: Tensor, upstream: Tensor) -> Tensor:
    if _is_traced(upstream):
        return made * upstream.to(made.dtype)
    torch.ops.fusedloss.scale_(made, upstream)
    return made


def _is_traced(upstream: Tensor) -> bool:
    """Whether a graph of the backward is made, which may run many times."""
    return type(upstream) is not Tensor


def _only(made: Any, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(each if want else None for each, want in zip(made, wanted, strict=True))


_kept: list[torch.library.Library] = []  # a library that is let go takes its ops with it
