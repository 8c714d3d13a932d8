"""The passes as ops of torch, which graphs hold as they are, and their derivatives."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _decomposed as _decompositions
from .._derivatives import needs_formula
from ._call import NONE

# formula(call, second, correct)(input, linear_weight, linear_bias): the loss, the second result, which rows are right
Formula = Callable[[Any, bool, bool], Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]]


class Family(NamedTuple):
    """Losses whose calls have the same fields. The first three are the input, the head and its bias."""

    name: str
    call: Any  # their NamedTuple
    tensors: int  # how many fields are tensors; they come first
    arguments: str  # the fields in a schema
    size: Callable[[Any], int]  # the numbers that forward keeps
    forward: Callable[..., tuple[Tensor, ...]]
    forward_with_gradients: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    formula: Formula

    def split(self, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """The call, and what an op is given beside it."""
        return self.call(*given[: self.fields]), given[self.fields :]

    @property
    def fields(self) -> int:
        return len(self.call._fields)

    @property
    def ops(self) -> tuple[Any, Any, Any]:
        """Forward, forward with the gradients, and backward."""
        library = torch.ops.fusedloss
        forward, with_grad, backward = (getattr(library, name) for name in self.schemas)
        return forward, with_grad, backward

    @property
    def schemas(self) -> dict[str, str]:
        given = self.arguments
        return {
            self.name: f"({given}, bool second, bool correct, bool keep, bool grad_input) "
            "-> (Tensor loss, Tensor second, Tensor correct, Tensor kept, Tensor grad_input)",
            f"{self.name}_with_grad": f"({given}, bool[3] wanted, bool correct) "
            "-> (Tensor loss, Tensor correct, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
            f"{self.name}_backward": f"(Tensor upstream, Tensor? upstream_second, {given}, bool second, Tensor kept, "
            "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
        }


def _linear(family: Family, *given: Any) -> tuple[Tensor, ...]:
    call, rest = family.split(given)
    with no_autocast(call):
        return family.forward(call, *rest)


def _linear_with_grad(family: Family, *given: Any) -> tuple[Tensor, ...]:
    call, rest = family.split(given)
    with no_autocast(call):
        return family.forward_with_gradients(call, *rest)


def _linear_backward(
    family: Family, upstream: Tensor, upstream_second: Tensor | None, *given: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    call, rest = family.split(given)
    with no_autocast(call):
        return family.backward(upstream, upstream_second, call, *rest)


def no_autocast(call: Any) -> AbstractContextManager[Any]:
    """The operands have their dtypes by now. A backward may run under autocast, which would round its products."""
    device = call.input.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# ---- without data, for tracing


def _empty_loss(call: Any) -> Tensor:
    return call.input.new_empty(call.row_shape if call.reduction == NONE else (), dtype=call.result)


def _empty_gradients(call: Any, wanted: list[bool]) -> tuple[Tensor, ...]:
    like = (call.input, call.linear_weight, call.linear_bias)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if want and tensor is not None
        else call.input.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    )


def _fake_linear(family: Family, *given: Any) -> tuple[Tensor, ...]:
    call, (second, correct, keep, grad_input) = family.split(given)
    new = call.input.new_empty
    return (
        _empty_loss(call),
        new(call.row_shape if second else 0, dtype=call.result),
        new(call.row_shape if correct else 0, dtype=call.arithmetic),
        new(family.size(call) if keep else 0, dtype=call.arithmetic),
        new(call.input.shape if grad_input else 0),
    )


def _fake_with_grad(family: Family, *given: Any) -> tuple[Tensor, ...]:
    call, (wanted, correct) = family.split(given)
    right = call.input.new_empty(call.row_shape if correct else 0, dtype=call.arithmetic)
    return _empty_loss(call), right, *_empty_gradients(call, wanted)


def _fake_backward(
    family: Family, upstream: Tensor, upstream_second: Tensor | None, *given: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    call, (*_, wanted) = family.split(given)
    return _empty_gradients(call, wanted)


# ---- derivatives


def _none_for(op_arguments: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return (*gradients, *[None] * (op_arguments - len(gradients)))


def _save(family: Family, ctx: Any, given: tuple[Any, ...], *made: Tensor) -> None:
    tensors = given[: family.tensors]
    ctx.save_for_backward(*(each for each in tensors if each is not None), *made)
    ctx.present = [each is not None for each in tensors]
    ctx.rest = given[family.tensors : family.fields]
    ctx.set_materialize_grads(False)


def _saved(family: Family, ctx: Any) -> tuple[Any, list[Tensor]]:
    tensors = iter(ctx.saved_tensors)
    given: list[Any] = [next(tensors) if present else None for present in ctx.present]
    return family.call(*given, *ctx.rest), list(tensors)


def _by_formula(formula: Formula, call: Any, second: bool, upstreams: list[Tensor | None]) -> tuple[Any, ...]:
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


def _decomposed(family: Family) -> Callable[..., tuple[Tensor, ...]]:
    """The op in PyTorch's own operators. What only its own backward reads is zeros."""

    def decomposed(*given: Any) -> tuple[Tensor, ...]:
        call, (second, correct, keep, _) = family.split(given)
        results = family.formula(call, second, correct)(*call[:3])
        new = call.input.new_zeros
        nothing = (new(0), new(0, dtype=call.result), new(0, dtype=call.arithmetic))
        wanted = (each if each is not None else empty for each, empty in zip(results, nothing, strict=True))
        return *wanted, new(family.size(call) if keep else 0, dtype=call.arithmetic), new(0)

    return decomposed


def register(family: Family) -> None:
    library = torch.library.Library("fusedloss", "FRAGMENT")
    _kept.append(library)
    kernels = (_linear, _linear_with_grad, _linear_backward)
    fakes = (_fake_linear, _fake_with_grad, _fake_backward)
    for (name, schema), kernel, fake in zip(family.schemas.items(), kernels, fakes, strict=True):
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, partial(kernel, family), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedloss::{name}", partial(fake, family), lib=library)
    forward_op, with_grad_op, backward_op = family.ops
    formula = family.formula

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(family, ctx, inputs, output[3])
        ctx.second, *_, ctx.grad_input = inputs[family.fields :]
        # Detached: an output that the node holds would hold the node.
        ctx.left = output[4].detach() if ctx.grad_input else None

    def backward(ctx: Any, upstream: Tensor | None, upstream_second: Tensor | None, *_: Any) -> Any:
        call, (kept,) = _saved(family, ctx)
        arguments, wanted = family.fields + 4, call.wanted
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
            of_input = scaled(_taken(ctx, upstream, lambda: forward_op(*call, False, False, False, True)[4]), upstream)
            wanted = [False, *wanted[1:]]
        made = _only(backward_op(upstream, upstream_second, *call, ctx.second, kept, wanted), wanted)
        return _none_for(arguments, (of_input, *made[1:]) if of_input is not None else made)

    def leave(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(family, ctx, inputs)
        ctx.left = [each.detach() for each in output[2:]]

    def scale(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        call, _nothing = _saved(family, ctx)
        arguments, wanted = family.fields + 2, call.wanted
        if upstream is None:
            return _none_for(arguments, ())
        if needs_formula(upstream):
            return _none_for(arguments, _by_formula(formula, call, False, [upstream]))
        left = _taken(ctx, upstream, lambda: with_grad_op(*call, wanted, False)[2:])
        made = _only(left, wanted)
        del left
        return _none_for(arguments, tuple(each if each is None else scaled(each, upstream) for each in made))

    def refuse(ctx: Any, *upstreams: Any) -> Any:
        raise RuntimeError(f"derivative for fusedloss::{family.name}_backward is not implemented")

    torch.library.register_autograd(f"fusedloss::{family.name}_backward", refuse, lib=library)
    torch.library.register_autograd(f"fusedloss::{family.name}", backward, setup_context=keep, lib=library)
    torch.library.register_autograd(f"fusedloss::{family.name}_with_grad", scale, setup_context=leave, lib=library)
    _decompositions.register(forward_op.default, _decomposed(family))


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
