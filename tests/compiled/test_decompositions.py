"""What an exported loss decomposes into: PyTorch's own operators, unless its op is taken out of the table."""

import pytest
import torch
from losses import ONE_OF_EACH, each_of
from marks import needs_extension
from test_open_sizes import A_FEW, CALLS, C, data
from torch.export import Dim

import fusedloss.functional as L


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


def fused_ops(program):
    return [str(node.target) for node in program.graph.nodes if "fusedloss" in str(node.target)]


@needs_extension
@each_of([loss for loss in ONE_OF_EACH if loss.family == "softmax"])
@pytest.mark.filterwarnings("error:.*CompositeImplicitAutograd.*")
def test_every_loss_decomposes(loss):
    module = Module(lambda x, y: loss.fused(x, y, "mean"))
    x, y = loss.data((6, 5), torch.float32)
    program = torch.export.export(module, (x, y))
    assert fused_ops(program)
    decomposed = program.run_decompositions()
    assert not fused_ops(decomposed)
    torch.testing.assert_close(decomposed.module()(x, y), module(x, y))


@needs_extension
@pytest.mark.parametrize("call", [*A_FEW, "cross_entropy with lse", "sigmoid focal, class indices"])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_options_and_open_sizes_decompose(call):
    n = Dim("n")
    module, (x, y) = Module(CALLS[call]), data(7)
    decomposed = torch.export.export(module, (x, y), dynamic_shapes=({0: n}, {0: n})).run_decompositions()
    assert not fused_ops(decomposed)
    for rows in (1, 9):
        x, y = data(rows)
        torch.testing.assert_close(decomposed.module()(x, y), module(x, y))


@needs_extension
def test_half_precision_with_wide_results_decomposes():
    x, t = torch.randn(6, C).bfloat16(), torch.rand(6, C)
    module = Module(lambda x, t: L.binary_cross_entropy_with_logits(x, t, pos_weight=torch.ones(C)))
    decomposed = torch.export.export(module, (x, t)).run_decompositions()
    assert not fused_ops(decomposed)
    torch.testing.assert_close(decomposed.module()(x, t), module(x, t))


@needs_extension
def test_an_op_that_is_not_in_the_table_is_kept():
    module, (x, y) = Module(L.cross_entropy), data(7)
    table = torch.export.default_decompositions()
    table.pop(torch.ops.fusedloss.cross_entropy.default)
    kept = torch.export.export(module, (x, y)).run_decompositions(table)
    assert fused_ops(kept) == ["fusedloss.cross_entropy.default"]
    torch.testing.assert_close(kept.module()(x, y), module(x, y))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", ["cross_entropy", "mse"])
def test_onnx(call):
    pytest.importorskip("onnxscript")
    x, y = data(7)
    program = torch.onnx.export(Module(CALLS[call]), (x, y), dynamo=True, verbose=False)
    assert not any("fusedloss" in node.domain for node in program.model.graph)
