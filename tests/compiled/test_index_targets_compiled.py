"""Class indices under torch.compile, torch.export, torch.func and forward-mode AD: fused ops, and eager's results."""

import pytest
import torch
from compare import value_and_grad
from index_calls import data, exact_loss, loss, runs_fused
from layouts import laid_out
from marks import needs_extension
from observe import compiled_with_ops, holds

import fusedloss


@needs_extension
@pytest.mark.thinned(1, deep=1)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded columns"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction, layout, weighted):
    x, y = data((6, 5, 4, 3))
    x = x.nan_to_num()
    view = laid_out(x, layout)
    ops = torch.ops.fusedloss
    weight = torch.rand(5, 1, 1, dtype=torch.float64) if weighted else None
    rest = (y, weight, reduction, [0.25, 2.0], None, False, -100)
    torch.library.opcheck(ops.sigmoid_focal.default, (view.detach().requires_grad_(), *rest))
    upstream = torch.ones(x.shape if reduction == 0 else (), dtype=x.dtype)
    torch.library.opcheck(ops.sigmoid_focal_backward.default, (upstream, view, *rest))
    if reduction != 0 and x.is_cpu:
        torch.library.opcheck(ops.sigmoid_focal_with_grad.default, (x, *rest))


@needs_extension
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_the_fused_ops_in_one_graph(dynamic):
    x, y = data((9, 7), torch.float32)
    module = fusedloss.SigmoidFocalLoss(weight=torch.rand(7))
    compiled, seen = compiled_with_ops(module, dynamic=dynamic)
    for arguments in ((y,), (y, torch.tensor([3.0])), (y.int(),)):
        seen.clear()
        results = []
        for function in (module, compiled):
            leaf = x.clone().requires_grad_()
            value = function(leaf, *arguments)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
        assert holds(seen, "sigmoid_focal") and holds(seen, "sigmoid_focal_backward")


def test_compile_of_what_is_declined_runs_natively():
    torch._dynamo.reset()
    x, y = data((9, 7, 2), torch.float32)
    weight = torch.rand(9, 7, 1, dtype=torch.float64)
    compiled = torch.compile(loss(weight=weight), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, "mean"), exact_loss(weight=weight)(x.double(), y, "mean").float())
    assert not runs_fused(x, y, weight)


@needs_extension
def test_export_keeps_the_fused_op():
    x, y = data((9, 7), torch.float32)
    program = torch.export.export(fusedloss.SigmoidFocalLoss(), (x, y))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "fusedloss.sigmoid_focal.default" in targets
    torch.testing.assert_close(program.module()(x, y), loss()(x, y, "mean"))


def test_functorch_and_forward_mode_ad():
    x, y = data((6, 5))
    x = x.nan_to_num()
    images = torch.func.vmap(lambda a, b: loss()(a, b, "sum"))(x.view(3, 2, 5), y.view(3, 2))
    expected = torch.stack([exact_loss()(a, b, "sum") for a, b in zip(x.view(3, 2, 5), y.view(3, 2), strict=True)])
    torch.testing.assert_close(images, expected)
    _, grad, _ = value_and_grad(exact_loss(), x, y, "mean", torch.tensor(1.0))
    torch.testing.assert_close(torch.func.grad(lambda a: loss()(a, y, "mean"))(x), grad)
    tangent = torch.rand_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(loss()(dual, y, "mean")).tangent
    torch.testing.assert_close(got, (grad * tangent).sum())
    hessian = torch.func.hessian(lambda a: loss()(a, y[:2], "sum"))(x[:2])
    assert hessian.shape == (2, 5, 2, 5) and hessian.isfinite().all()
