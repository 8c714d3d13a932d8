"""Sizes that a compiler keeps open: as many graphs as torch.nn makes, and right results, by the fused op where it is
kept."""

import pytest
import torch
from marks import needs_extension
from observe import compiled_with_ops, keeps_op
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fusedloss.functional as L

C = 5
CALLS = {
    "cross_entropy": lambda x, y: L.cross_entropy(x, y, torch.linspace(1, 2, C, device=x.device), label_smoothing=0.1),
    "cross_entropy of every row": lambda x, y: L.cross_entropy(x, y, reduction="none"),
    "cross_entropy with lse": lambda x, y: sum(map(torch.sum, L.cross_entropy(x, y, return_lse=True, z_loss=1e-3))),
    "cross_entropy of probabilities": lambda x, y: L.cross_entropy(x, x.detach().softmax(1)),
    "nll": lambda x, y: L.nll_loss(x, y, reduction="sum"),
    "focal": lambda x, y: L.focal_loss(x, y),
    "log_probs": lambda x, y: L.log_probs(x, y),
    "mse": lambda x, y: L.mse_loss(x, x.detach() * 2),
    "mse, broadcast": lambda x, y: L.mse_loss(x, x.detach()[:, :1]),
    "huber, weight": lambda x, y: L.huber_loss(x, x.detach() * 2, weight=x.detach().abs(), reduction="none"),
    "logits": lambda x, y: L.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "logits, class indices": lambda x, y: L.binary_cross_entropy_with_logits(x, y, ignore_index=-100),
    "sigmoid focal, class indices": lambda x, y: L.sigmoid_focal_loss(x, y),
}

A_FEW = ["cross_entropy", "log_probs", "mse, broadcast", "logits, class indices"]  # everywhere/ has every loss


def data(rows: int, *inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, C, *inner, requires_grad=True), torch.randint(2, C, (rows, *inner))


@needs_extension
@pytest.mark.thinned(1)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("call", A_FEW)
def test_twenty_batch_sizes_make_the_graphs_of_torch(call, dynamic):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[call], backend=backend, dynamic=dynamic)
    for rows in range(21, 1, -1):
        x, y = data(rows)
        value = compiled(x, y)
        torch.testing.assert_close(value, CALLS[call](x, y))
        value.sum().backward()
    # With dynamic=True the compiler may begin once more: it opens a default that is a float, which an op pins down.
    assert backend.frame_count <= 2


@needs_extension
@pytest.mark.parametrize("call", A_FEW)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_a_mask_picks(call):
    run = lambda x, y: CALLS[call](x[y > 2], y[y > 2])  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    for rows, least in ((8, 3), (5, 3), (6, 0)):
        x, y = data(rows)
        y[0] = least
        y = y if least else torch.zeros_like(y)  # no row at all: NaN for a mean, and a gradient of zeros
        results = []
        for function in (run, compiled):
            leaf = x.detach().requires_grad_()
            value = function(leaf, y)
            value.sum().backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0], equal_nan=True)
    assert any(op.startswith("fusedloss.") for op in ops) == keeps_op(call.split(",")[0])


@needs_extension
@pytest.mark.thinned(1)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_an_exported_loss_runs_at_other_sizes(call, strict):
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return CALLS[call](x, y)

    n, d = Dim("n"), Dim("d")
    sizes = ({0: n, 2: d}, {0: n, 1: d})
    x, y = data(7, 4)
    program = torch.export.export(Module(), (x, y), dynamic_shapes=sizes, strict=strict)
    assert "fusedloss" in str(program.graph)
    for rows, inner in ((1, 1), (3, 5), (C, 2), (0, 2)):
        x, y = data(rows, inner)
        torch.testing.assert_close(program.module()(x, y), Module()(x, y), equal_nan=True)


@needs_extension
@pytest.mark.parametrize("call", ["cross_entropy", "logits"])
def test_a_dimension_marked_as_dynamic(call):
    compiled, ops = compiled_with_ops(CALLS[call])
    for rows in (7, 9):
        x, y = data(rows)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        torch.testing.assert_close(compiled(x, y), CALLS[call](x, y))
    assert sum(op.startswith("fusedloss.") for op in ops) == 2  # one graph, and its backward


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, i: L.cross_entropy(x, y, ignore_index=i),
        lambda x, y, i: L.nll_loss(x, y, ignore_index=i),
        lambda x, y, i: L.sigmoid_focal_loss(x, y, ignore_index=i, reduction="mean"),
    ],
)
def test_an_ignore_index_that_changes_makes_two_graphs(loss):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=backend)
    x, y = data(9)
    for index in (3, 2, 4, -100, -7):
        torch.testing.assert_close(compiled(x, y, index), loss(x, y, index))
    assert backend.frame_count == 2


@needs_extension
@pytest.mark.parametrize("reduction, value", [(0, None), (1, float("nan")), (2, 0.0)])
def test_ops_take_empty_inputs(reduction, value):
    x, y, ops = torch.randn(0, C), torch.empty(0, dtype=torch.int64), torch.ops.fusedloss
    losses, second, statistics = ops.cross_entropy(x, y, None, reduction, -100, [0.0] * 3, False, True)
    pointwise = ops.mse(x, x, None, reduction, [])
    for got, shape in ((losses, (0,)), (pointwise, (0, C))):
        torch.testing.assert_close(got, torch.empty(shape) if value is None else torch.tensor(value), equal_nan=True)
    assert second.shape == (0,)
    upstream = torch.ones_like(losses)
    gradient = ops.cross_entropy_backward(upstream, None, x, y, None, statistics, reduction, -100, [0.0] * 3)
    assert gradient.shape == ops.mse_backward(torch.ones_like(pointwise), x, x, None, reduction, []).shape == (0, C)
    with pytest.raises(RuntimeError, match="the logits are empty"):
        ops.cross_entropy(torch.randn(3, 0), torch.zeros(3, dtype=torch.int64), None, reduction, -100, [0.0] * 3)
