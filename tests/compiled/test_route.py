"""The three ways a call can go: eager kernels, ops in a captured graph, native for what is declined."""

import os
import subprocess
import sys

import pytest
import torch
from compare import value_and_grad
from layouts import laid_out
from losses import LOSSES, ONE_OF_EACH, SOFTMAX, Loss, each_of, extension, runs_fused
from marks import needs_extension
from observe import Recorder, compiled_with_ops, holds
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusedloss
import fusedloss.functional as L

SHAPE = (6, 5, 4, 3)
LAYOUTS = ["contiguous", "reversed", "sliced", "sliced and reversed", "expanded columns"]


def op_arguments(loss: Loss, reduction: int, layout: str, requires_grad: bool = True):
    x, target = loss.data(SHAPE, torch.float64)
    x = laid_out(x, layout)
    middle = (-100,) if loss in SOFTMAX else ()
    return (x.detach().requires_grad_(requires_grad), target, None, reduction, *middle, list(loss.params))


@pytest.mark.thinned(1, deep=1)
@needs_extension
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_of(ONE_OF_EACH)
def test_opcheck(loss, layout, reduction):
    # Strides included: under a compiler an op is given whatever layout comes, and must return what its fake promised.
    arguments = op_arguments(loss, reduction, layout)
    forward = getattr(torch.ops.fusedloss, loss.op).default
    torch.library.opcheck(forward, arguments)
    with torch.no_grad():
        value = forward(*arguments)
    x, target, weight, *rest = op_arguments(loss, reduction, layout, requires_grad=False)
    if reduction and loss.op != "nll":
        torch.library.opcheck(getattr(torch.ops.fusedloss, loss.op).carrying, (x, target, weight, *rest))
    backward = getattr(torch.ops.fusedloss, loss.op + "_backward").default
    if loss not in SOFTMAX:
        torch.library.opcheck(backward, (torch.ones_like(value), x, target, weight, *rest))
        return
    torch.library.opcheck(getattr(torch.ops.fusedloss, loss.op).without_second, (x, target, weight, *rest))
    value, _, statistics = value
    for second in (None, torch.ones(loss.losses_shape(SHAPE), dtype=x.dtype)):
        torch.library.opcheck(backward, (torch.ones_like(value), second, x, target, weight, statistics, *rest))


class AllLosses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.cross_entropy = fusedloss.CrossEntropyLoss(weight=torch.rand(7))
        self.focal = fusedloss.FocalLoss(gamma=1.5)
        self.huber = fusedloss.HuberLoss(delta=0.5)
        self.sigmoid_focal = fusedloss.SigmoidFocalLoss()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = self.linear(x)
        return self.cross_entropy(z, y) + self.focal(z, y) + self.huber(z, x) + self.sigmoid_focal(z, x.sigmoid())


OPS = ["fusedloss.cross_entropy", "fusedloss.focal", "fusedloss.huber", "fusedloss.sigmoid_focal"]


@pytest.mark.thinned(1)
@needs_extension
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_the_fused_ops_in_one_graph(backend, dynamic):
    torch._dynamo.reset()
    model, y = AllLosses(), torch.randint(7, (9,))
    x = torch.randn(9, 7)
    model(x, y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    value = compiled(x, y)
    torch.testing.assert_close(value, model(x, y))
    value.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    if dynamic:
        torch.testing.assert_close(compiled(torch.ones(5, 7), y[:5]), model(torch.ones(5, 7), y[:5]))


@needs_extension
@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_fused_ops(strict):
    model, x, y = AllLosses(), torch.randn(9, 7), torch.randint(7, (9,))
    program = torch.export.export(model, (x, y), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in OPS if not any(target.startswith(name + ".") for target in targets)] == []
    torch.testing.assert_close(program.module()(x, y), model(x, y))


@needs_extension
@pytest.mark.parametrize("which", ["cross_entropy", "sigmoid_focal_loss"])
def test_export_keeps_the_number_of_classes_open(which):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return getattr(L, which)(x, y, ignore_index=-100)

    x, y = torch.randn(6, 5), torch.arange(6) % 5
    program = torch.export.export(Model(), (x, y), dynamic_shapes=({1: torch.export.Dim("classes")}, None))
    assert any("fusedloss" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(6, 9)
    torch.testing.assert_close(program.module()(x, y), Model()(x, y))


def test_compile_of_what_is_declined_runs_natively():
    torch._dynamo.reset()
    x, y = torch.randn(4, 5), torch.randint(5, (4,))
    compiled = torch.compile(
        lambda x, y: L.cross_entropy(x, y, label_smoothing=0.1) + L.cross_entropy(x, x.softmax(1)),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(
        compiled(x, y),
        nn.functional.cross_entropy(x, y, label_smoothing=0.1) + nn.functional.cross_entropy(x, x.softmax(1)),
    )


@needs_extension
def test_compiled_autograd_captures_the_backward_op():
    x, y = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    compiled, seen = compiled_with_ops(L.cross_entropy)
    compiled(x, y).backward()
    assert holds(seen, "cross_entropy") and holds(seen, "cross_entropy_backward")


@each_of(ONE_OF_EACH)
def test_functorch(loss):
    x, target = loss.data((6, 5), torch.float64)
    target = target.clamp_min(0)
    rows = torch.func.vmap(lambda a, b: loss.fused(a, b, "mean"))(x, target)
    torch.testing.assert_close(rows, torch.stack([loss.native(a, b, "mean") for a, b in zip(x, target, strict=True)]))
    grad = torch.func.grad(lambda a: loss.fused(a, target, "mean"))(x)
    torch.testing.assert_close(grad, value_and_grad(loss.native, x, target, "mean", torch.tensor(1.0))[1])
    jacobian = torch.func.jacrev(lambda a: loss.fused(a, target[:2], "mean"))(x[:2])
    torch.testing.assert_close(jacobian, torch.func.jacfwd(lambda a: loss.fused(a, target[:2], "mean"))(x[:2]))
    if loss.op == "soft_margin":  # whose backward has no forward-mode derivative in torch
        return
    hessian = torch.func.hessian(lambda a: loss.fused(a, target[:2], "mean"))(x[:2])
    assert hessian.shape == (2, 5, 2, 5) and hessian.isfinite().all()


@each_of(ONE_OF_EACH)
def test_forward_mode_ad(loss):
    x, target = loss.data((6, 5), torch.float64)
    tangent = torch.rand_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(loss.fused(dual, target, "mean")).tangent
    _, grad, _ = value_and_grad(loss.native, x, target, "mean", torch.tensor(1.0))
    torch.testing.assert_close(got, (grad * tangent).sum())


class Subclass(torch.Tensor):
    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


@each_of(ONE_OF_EACH)
def test_tensor_subclasses_see_torchs_functions(loss):
    x, target = loss.data((6, 5), torch.float32)
    Subclass.seen.clear()
    torch.testing.assert_close(
        loss.fused(x.as_subclass(Subclass), target, "mean").as_subclass(torch.Tensor), loss.native(x, target, "mean")
    )
    assert Subclass.seen


@each_of(LOSSES)
def test_declined_calls_run_natively(loss):
    x, target = loss.data((6, 5), torch.float32)
    assert not runs_fused(loss, x.to_sparse(), target)
    assert not runs_fused(loss, x.to("meta"), target.to("meta"))
    assert not runs_fused(loss, x.as_subclass(Subclass), target)
    assert not runs_fused(loss, torch.view_as_complex(torch.stack([x, x], -1)).conj().imag, target)  # a negative view
    assert not runs_fused(loss, x, target, "elementwise_mean")
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        # By torch: probabilities in half precision. Autocast widens some steps of the Gaussian's formula.
        refused = (x.is_cuda and loss.op == "binary_cross_entropy") or loss.op == "gaussian_nll"
        fused = runs_fused(loss, x.bfloat16(), target.bfloat16() if target.is_floating_point() else target)
        assert fused is not refused
    assert loss.fused(x.to("meta"), target.to("meta"), "none").shape == loss.losses_shape(x.shape)


@needs_extension
@each_of(ONE_OF_EACH)
def test_the_extension_names_arguments_it_does_not_take(loss):
    x, target = loss.data((6, 5), torch.float32)
    middle = (-100,) if loss in SOFTMAX else ()
    for function in (extension.losses[loss.op].run, extension.losses[loss.op].explain):
        with pytest.raises(TypeError, match="got an unexpected keyword argument 'ignore'"):
            function(x, target, None, "mean", *middle, ignore=1)
        with pytest.raises(TypeError, match=f"expected {4 + len(middle)} arguments before the parameters, got 3"):
            function(x, target, None)


@needs_extension
def test_autocast_gives_torchs_dtypes():
    x, y = torch.randn(4, 5, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 3])
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert L.cross_entropy(x, y).dtype == nn.functional.cross_entropy(x, y).dtype == torch.float32


def test_fake_tensors_outside_a_compiler():
    for loss in ONE_OF_EACH:
        x, target = loss.data((6, 5), torch.float32)
        with FakeTensorMode() as mode:
            fake = loss.fused(mode.from_tensor(x), mode.from_tensor(target), "none")
        assert fake.shape == loss.losses_shape(x.shape)


@needs_extension
def test_dispatch_modes_see_the_ops_of_the_eager_route():
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    with Recorder() as recorder:
        L.cross_entropy(x, y, grad_in_forward=False).backward()
    assert "fusedloss.cross_entropy.without_second" in recorder.seen
    assert "fusedloss.cross_entropy_backward.default" in recorder.seen


RECORDED = {loss.name: (loss.op, loss.fused) for loss in ONE_OF_EACH}
RECORDED |= {
    option: ("cross_entropy", lambda x, t, r, option=option: L.cross_entropy(x, t, reduction=r, **{option: True}))
    for option in ("grad_in_forward", "inplace")
}


@pytest.mark.thinned(1)
@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECORDED)
def test_make_fx_records_ops_that_can_be_run_and_differentiated_again(name, dtype):
    # No gradient of forward, which has no derivative, and none of a bfloat16 upstream gradient's numbers.
    op, fused = RECORDED[name]
    loss = next(loss for loss in ONE_OF_EACH if name in (loss.name, "grad_in_forward", "inplace"))
    x, target = loss.data((6, 5), dtype)

    def step(x, target):
        value = fused(x * 1, target, "mean")
        return value, torch.autograd.grad(value, x, torch.full_like(value, 0.3))[0]

    graph = make_fx(step)(x.clone().requires_grad_(), target)
    ops = [str(node.target) for node in graph.graph.nodes]
    assert f"fusedloss.{op}.default" in ops and f"fusedloss.{op}_backward.default" in ops
    for given in (x, x.flip(0).contiguous()):
        leaf = given.clone().requires_grad_()
        value, grad = graph(leaf, target)
        expected = step(given.clone().requires_grad_(), target)
        torch.testing.assert_close((value.detach(), grad.detach()), (expected[0].detach(), expected[1]))
        torch.testing.assert_close(torch.autograd.grad(value, leaf, torch.full_like(value, 0.3))[0], expected[1])


def test_traced_graphs_hold_no_fused_op():
    traced = torch.jit.trace(lambda x, y: L.huber_loss(x, y), (torch.randn(3), torch.randn(3)))
    assert "fusedloss::" not in str(traced.graph) and "huber_loss" in str(traced.graph)


@pytest.mark.deep("compiles in a process of its own with nothing cached; compiled steps in this one ran")
@needs_extension
def test_inductor_is_first_imported_after_the_losses():
    """As in every training script, but in no test that runs beside others: Inductor notes on import what decomposes."""
    script = """
import sys, torch, fusedloss
assert "torch._inductor.decomposition" not in sys.modules
torch.set_num_threads(1)
x, y = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
loss = torch.compile(lambda x, y: fusedloss.CrossEntropyLoss()(x, y) + fusedloss.HuberLoss()(x, x.detach() / 2))
loss(x, y).backward()
expected, = torch.autograd.grad(loss._torchdynamo_orig_callable(x, y), x)
torch.testing.assert_close(x.grad, expected)
"""
    fresh = {**os.environ, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=fresh)
    assert done.returncode == 0, done.stderr[-2000:]
