"""Where a user may put a loss: each situation runs a call there and gives the tensors to compare.

A situation takes `loss(input, target)`, an input and a target. It calls the loss as a user would in that place, so that
the fused loss and plain PyTorch can be run in it alike.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from compare import upstream_of
from observe import of_any_size
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor], Tensor]
Situation = Callable[[Loss, Tensor, Tensor], Any]
SITUATIONS: dict[str, Situation] = {}
PLAIN: dict[str, Situation] = {}  # what gives the same numbers, for situations that torch itself does not always master


def situation(name: str, plain: Situation | None = None) -> Callable[[Situation], Situation]:
    def add(run: Situation) -> Situation:
        SITUATIONS[name] = run
        if plain:
            PLAIN[name] = plain
        return run

    return add


def leaf(input: Tensor) -> Tensor:
    return input.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def with_gradient(loss: Loss, input: Tensor, target: Tensor) -> list[Tensor]:
    x = leaf(input)
    value = loss(x, target)
    return [value.detach(), *torch.autograd.grad(value, x, upstream_of(value))]


def like(input: Tensor, seed: int = 3) -> Tensor:
    return torch.randn(input.shape, generator=torch.Generator().manual_seed(seed)).to(input.dtype)


# ---- eager


@situation("a value")
def value(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return loss(input, target)


@situation("a gradient")
def gradient(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(loss, input, target)


@situation("`inference_mode`")
def inference_mode(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.inference_mode():
        return loss(input, target).clone()


@situation("an expanded upstream gradient")
def expanded(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = loss(x, target)
    return torch.autograd.grad(value, x, torch.tensor(0.5, dtype=value.dtype).expand_as(value))


@situation("a strided input")
def strided(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(loss, input.mT.contiguous().mT, target)


@situation("`retain_graph=True`, backward twice")
def twice(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = loss(x, target)
    upstream = upstream_of(value)
    return [torch.autograd.grad(value, x, upstream, retain_graph=True)[0] for _ in range(2)]


@situation("backward twice without `retain_graph`")
def freed(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = loss(x, target).sum()
    value.backward()
    value.backward()


@situation("a second derivative")
def second(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = loss(x, target)
    (grad,) = torch.autograd.grad(value, x, upstream_of(value), create_graph=True)
    return torch.autograd.grad(grad, x, like(grad))


@situation("a third derivative")
def third(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    (grad,) = torch.autograd.grad(loss(x, target).sum(), x, create_graph=True)
    (of_grad,) = torch.autograd.grad(grad.sin().sum(), x, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(of_grad.square().sum(), x, materialize_grads=True)


@situation("hooks on tensors")
def hooks(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    seen: list[Tensor] = []
    product = x * 1
    product.register_hook(lambda grad: seen.append(grad.clone()))
    product.retain_grad()
    loss(product, target).sum().backward()
    return [x.grad, product.grad, *seen]


@situation("`detect_anomaly`")
def anomaly(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autograd.detect_anomaly(check_nan=False):
        return with_gradient(loss, input, target)


@situation("saved-tensor hooks")
def saved_tensor_hooks(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        return with_gradient(loss, input, target)


@situation("`checkpoint`")
def checkpointed(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(lambda x, t: checkpoint(loss, x, t, use_reentrant=False), input, target)


@situation("`checkpoint`, reentrant")
def checkpointed_reentrant(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = checkpoint(loss, x, target, use_reentrant=True)
    value.backward(upstream_of(value))
    return [value.detach(), x.grad]


@situation("logits overwritten after forward")
def overwritten(loss: Loss, input: Tensor, target: Tensor) -> Any:
    """Right, or torch's error, never a wrong gradient: torch itself may save what it needs."""
    x = leaf(input)
    copy = x * 1
    value = loss(copy, target)
    expected = torch.autograd.grad(loss(x, target), x, upstream_of(value))
    copy.detach().zero_()
    with contextlib.suppress(RuntimeError):
        (got,) = torch.autograd.grad(value, x, upstream_of(value))
        return [got]
    return expected


@situation("`autocast` to bfloat16")
def autocast(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return with_gradient(lambda x, t: loss(x.bfloat16(), t), input, target)


@situation("`use_deterministic_algorithms`")
def deterministic(loss: Loss, input: Tensor, target: Tensor) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return with_gradient(loss, input, target)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- batches of gradients, torch.func


@situation("`is_grads_batched`")
def grads_batched(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = loss(x, target)
    upstreams = torch.stack([upstream_of(value), -upstream_of(value)])
    return torch.autograd.grad(value, x, upstreams, is_grads_batched=True)


@situation("`functional.jacobian(vectorize=True)`")
def jacobian(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return torch.autograd.functional.jacobian(lambda x: loss(x, target), input, vectorize=True)


@situation("`functional.hessian(vectorize=True)`")
def hessian_vectorized(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda x: loss(x, target).sum(), input, vectorize=True)


@situation("dual tensors")
def dual(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(input, like(input)), target))


@situation("`func.grad`")
def func_grad(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return torch.func.grad_and_value(lambda x: loss(x, target).sum())(input)


@situation("`func.vmap`")
def func_vmap(loss: Loss, input: Tensor, target: Tensor) -> Any:
    inputs = torch.stack([input, input.flip(0)])
    return torch.func.vmap(lambda x: loss(x, target))(inputs)


@situation("`func.vmap` of `func.grad`")
def func_vmap_grad(loss: Loss, input: Tensor, target: Tensor) -> Any:
    inputs = torch.stack([input, input.flip(0)])
    return torch.func.vmap(torch.func.grad(lambda x: loss(x, target).sum()))(inputs)


@situation("`func.jvp`")
def func_jvp(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return torch.func.jvp(lambda x: loss(x, target), (input,), (like(input),))


@situation("`func.jacrev`")
def func_jacrev(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return torch.func.jacrev(lambda x: loss(x, target))(input)


@situation("`func.hessian`")
def func_hessian(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return torch.func.hessian(lambda x: loss(x, target).sum())(input)


# ---- modes, tracing


class Seeing(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass that adds nothing."""


@situation("a `TorchFunctionMode`")
def function_mode(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with Seeing():
        return with_gradient(loss, input, target)


@situation("a `TorchDispatchMode`")
def dispatch_mode(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with Dispatching():
        return with_gradient(loss, input, target)


@situation("a subclass of `Tensor`")
def subclass(loss: Loss, input: Tensor, target: Tensor) -> Any:
    value = loss(input.as_subclass(Labelled), target)
    assert isinstance(value, Labelled)
    return value.as_subclass(Tensor)


@situation("`fx.symbolic_trace`", plain=with_gradient)
def symbolic_trace(loss: Loss, input: Tensor, target: Tensor) -> Any:
    traced = torch.fx.symbolic_trace(lambda x, t: loss(x, t))
    return with_gradient(traced, input, target)


@situation("`jit.trace`")
def jit_trace(loss: Loss, input: Tensor, target: Tensor) -> Any:
    traced = torch.jit.trace(lambda x, t: loss(x, t), (input, target), check_trace=False)
    return with_gradient(traced, input, target)


# ---- torch.compile


def compiled(loss: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return of_any_size(torch.compile(loss, backend=backend, fullgraph=True, **options))


@situation("`compile`")
def compile_gradient(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return with_gradient(compiled(loss), input, target)


@situation("`compile` of few elements")
def compile_few(loss: Loss, input: Tensor, target: Tensor) -> Any:
    torch._dynamo.reset()
    return with_gradient(torch.compile(loss, backend="aot_eager", fullgraph=True), input, target)


@situation("`compile(dynamic=True)`, another size")
def compile_dynamic(loss: Loss, input: Tensor, target: Tensor) -> Any:
    function = compiled(loss, dynamic=True)
    with_gradient(function, input, target)
    with torch.compiler.set_stance("fail_on_recompile"):
        return with_gradient(function, torch.cat([input, input]), torch.cat([target, target]))


@situation("`compile`, `mark_dynamic`")
def compile_marked(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x, t = leaf(input), target.clone()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(t, 0)
    value = compiled(loss)(x, t)
    return [value.detach(), *torch.autograd.grad(value, x, upstream_of(value))]


def every_other(loss: Loss, input: Tensor, target: Tensor) -> Any:
    kept = torch.arange(len(input)) % 2 == 0
    return loss(input[kept], target[kept])


@situation("`compile`, rows that a mask selects", plain=every_other)
def compile_unbacked(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return compiled(every_other, "eager")(loss, input, target)


@situation("`compile` of `func.grad`")
def compile_func_grad(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return compiled(torch.func.grad(lambda x, t: loss(x, t).sum()), "eager")(input, target)


@situation("`compile` of `func.vmap`")
def compile_func_vmap(loss: Loss, input: Tensor, target: Tensor) -> Any:
    inputs = torch.stack([input, input.flip(0)])
    return compiled(torch.func.vmap(loss, in_dims=(0, None)), "eager")(inputs, target)


@situation("`compile` of `func.jvp`")
def compile_func_jvp(loss: Loss, input: Tensor, target: Tensor) -> Any:
    run = compiled(lambda x, t, tangent: torch.func.jvp(lambda z: loss(z, t), (x,), (tangent,)), "eager")
    try:
        return run(input, target, like(input))
    except NotImplementedError:  # torch leaves forward mode on, in which the next one could not begin
        torch._C._exit_dual_level(level=0)
        raise


@situation("`compile` under `autocast`")
def compile_autocast(loss: Loss, input: Tensor, target: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return with_gradient(compiled(lambda x, t: loss(x.bfloat16(), t)), input, target)


@situation("compiled autograd")
def compiled_autograd(loss: Loss, input: Tensor, target: Tensor) -> Any:
    x = leaf(input)
    value = loss(x, target)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        value.backward(upstream_of(value))
    return x.grad


# ---- torch.export


class Module(torch.nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input, target)


def exported(loss: Loss, input: Tensor, target: Tensor, **options: Any) -> torch.export.ExportedProgram:
    return torch.export.export(Module(loss), (input, target), **options)


@situation("`export`")
def export(loss: Loss, input: Tensor, target: Tensor) -> Any:
    return exported(loss, input, target).module()(input, target)


@situation("`export`, a dynamic batch")
def export_dynamic(loss: Loss, input: Tensor, target: Tensor) -> Any:
    rows = torch.export.Dim("rows")
    program = exported(loss, input, target, dynamic_shapes={"input": {0: rows}, "target": {0: rows}})
    return program.module()(torch.cat([input, input]), torch.cat([target, target]))


@situation("`run_decompositions`")
def run_decompositions(loss: Loss, input: Tensor, target: Tensor) -> Any:
    program = exported(loss, input, target).run_decompositions()
    assert not [node for node in program.graph.nodes if "fusedloss" in str(node.target)]
    return program.module()(input, target)
