"""More situations: what torch wraps around a training step, and tensors that are no plain tensors of a CPU."""

import functools
from typing import Any

import torch
from compare import upstream_of
from situations import Loss, Module, leaf, situation, with_gradient
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# ---- what autograd saves


def raises(tensor: Tensor) -> Tensor:
    raise KeyError("a hook")


@situation("`save_on_cpu`")
def save_on_cpu(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return with_gradient(loss, input, target)


@situation("a hook that raises where a tensor is saved")
def pack_raises(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(raises, lambda tensor: tensor):
        return with_gradient(loss, input, target)


@situation("a hook that raises where a saved tensor is read")
def unpack_raises(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, raises):
        return with_gradient(loss, input, target)


@situation("`allow_mutation_on_saved_tensors`")
def mutation(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        copy = x * 1
        value = loss(copy, target)
        with torch.no_grad():
            copy.zero_()
        return torch.autograd.grad(value, x, upstream_of(value))


@situation("selective `checkpoint`", plain=with_gradient)
def selective_checkpoint(loss: Loss, input: Tensor, target: Tensor) -> Any:
    policy = lambda context, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE  # noqa: E731
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = lambda x, t: checkpoint(loss, x, t, use_reentrant=False, context_fn=contexts)  # noqa: E731
    return with_gradient(run, input, target)


# ---- graphs that make_fx records, run with an input that requires a gradient


@situation("`make_fx`")
def recorded(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(make_fx(loss)(leaf(input), target), input, target)


@situation("`make_fx` of a gradient, run twice")
def recorded_gradient(loss: Loss, input: Tensor, target: Tensor) -> Any:
    graph = make_fx(lambda x, t: with_gradient_of_ones(loss, x * 1, t))(leaf(input), target)
    return [graph(leaf(each), target)[1].detach() for each in (input, input.flip(0))]


@situation("`make_fx(pre_dispatch=True)`")
def recorded_before_dispatch(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(make_fx(loss, pre_dispatch=True)(leaf(input), target), input, target)


# ---- modules


@situation("forward and backward hooks on a module")
def module_hooks(loss: Loss, input: Tensor, target: Tensor) -> Any:
    module, seen = Module(loss), []
    module.register_forward_hook(lambda module, given, value: 2 * value)
    module.register_full_backward_pre_hook(lambda module, upstream: seen.append(upstream[0].clone()))
    module.register_full_backward_hook(lambda module, of_input, upstream: seen.append(of_input[0].clone()))
    return [*with_gradient(module, input, target), *seen]


@situation("`DataParallel`")
def data_parallel(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(nn.DataParallel(Module(loss)), input, target)


class _Model(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()) / 2 + 0.25)
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input * self.scale, target)


@situation("`functional_call`")
def functional_call(loss: Loss, input: Tensor, target: Tensor) -> Any:
    scale = torch.tensor(0.75, requires_grad=True)
    value = torch.func.functional_call(_Model(loss), {"scale": scale}, (input, target))
    return [value.detach(), *torch.autograd.grad(value, scale, upstream_of(value))]


@situation("an ensemble: `vmap` of `functional_call`")
def ensemble(loss: Loss, input: Tensor, target: Tensor) -> Any:
    model = _Model(loss)
    parameters, _ = torch.func.stack_module_state([_Model(loss) for _ in range(3)])
    call = lambda state: torch.func.functional_call(model, state, (input, target)).sum()  # noqa: E731
    return [*torch.func.vmap(torch.func.grad_and_value(call))(parameters)]


# ---- tensors that are no plain ones


class Wrapped(Tensor):
    """A tensor around another, with ``__torch_dispatch__`` alone."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrap = lambda each: each.inner if isinstance(each, cls) else each  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        wrap = lambda each: cls(each) if isinstance(each, Tensor) else each  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, function(*args, **kwargs))


@situation("a subclass with `__torch_dispatch__`")
def wrapper_subclass(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = Wrapped(input).requires_grad_()
    value = loss(x, target)
    (grad,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return [value.inner.detach(), grad.inner]


@situation("a subclass of two tensors")
def two_tensors(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = TwoTensor(input, input.flip(0).contiguous()).requires_grad_()
    value = loss(x, target)
    (grad,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return [value.a.detach(), value.b.detach(), grad.a, grad.b]


@situation("a negated view")
def negated(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(lambda x, t: loss(torch.complex(x, -x).conj().imag, t), input, target)


def _described(*tensors: Tensor) -> list[Tensor]:
    return [torch.tensor([*tensor.shape, *tensor.stride(), tensor.itemsize]) for tensor in tensors]


@situation("meta tensors")
def meta(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return _described(*with_gradient_of_ones(loss, input.to("meta"), target.to("meta")))


@situation("`FakeTensorMode`")
def fake(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with FakeTensorMode() as mode:
        results = with_gradient_of_ones(loss, mode.from_tensor(input), mode.from_tensor(target))
    return _described(*results)


@situation("`FakeTensorMode` around plain tensors")
def fake_around(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        value = loss(input, target)
    return _described(value)


def with_gradient_of_ones(loss: Loss, input: Tensor, target: Tensor) -> list[Tensor]:
    x = input.detach().requires_grad_()
    value = loss(x, target)
    return [value.detach(), *torch.autograd.grad(value, x, torch.ones_like(value))]


@situation("a sparse input")
def sparse(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return loss(input.to_sparse(), target)


@situation("a nested input")
def nested(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return loss(torch.nested.nested_tensor([input[:2], input[2:]]), target)


@situation("a quantized input")
def quantized(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return loss(torch.quantize_per_tensor(input, 0.1, 0, torch.quint8), target)
