"""`linear_kl_divergence` under compilers: one op in the graph, eager's results, open sizes, exports."""

from typing import Any

import pytest
import torch
from compare import upstreams
from linear_distillation_calls import ROUTES, call, labels_of, leaves, operands, weight_of, with_numbers
from losses import HALVES
from marks import needs_extension
from observe import compiled_with_ops, holds
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.library import opcheck

import fusedloss.functional as L

MANY = pytest.mark.deep("the linear divergence compiled in other ways; one of each kind ran")


def step(function: Any, given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    loss = function(given, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves(given), upstreams(loss))]


def graph_ops(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@needs_extension
@pytest.mark.parametrize(
    ("route", "direction", "dtype", "teacher"),
    [
        ("in forward", "forward", torch.float32, "hidden states"),
        ("each row", "jsd", torch.bfloat16, "numbers"),
        pytest.param("in backward", "reverse", torch.float64, "numbers", marks=MANY),
        pytest.param("in forward", "forward", torch.float16, "hidden states", marks=MANY),
    ],
)
def test_a_graph_holds_one_op_and_gives_eagers_results(route, direction, dtype, teacher):
    given = operands(dtype=dtype)
    given = with_numbers(given) if teacher == "numbers" else given
    options = {**ROUTES[route], "direction": direction, "labels": labels_of(), "weight": weight_of(dtype=dtype)}
    compiled, ops = compiled_with_ops(lambda given: call(given, **options))
    torch.testing.assert_close(step(compiled, given), step(call, given, **options))
    in_forward = route == "in forward" and dtype != torch.float16
    assert holds(ops, "linear_kl_divergence_with_grad" if in_forward else "linear_kl_divergence")
    assert not any("mm" in op or "softmax" in op for op in ops)


@needs_extension
@pytest.mark.parametrize("route", ["in forward", pytest.param("each row", marks=MANY)])
def test_ten_batch_sizes_make_few_graphs(route):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda given: call(given, **ROUTES[route]), backend=backend, fullgraph=True)
    for rows in range(30, 10, -2):
        given = operands((rows,))
        torch.testing.assert_close(step(compiled, given), step(call, given, **ROUTES[route]))
    assert backend.frame_count <= 2


@needs_extension
def test_an_export_keeps_the_op_at_open_sizes_and_decomposes():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(6, 11)

        def forward(self, input: Tensor, teacher: Tensor) -> Tensor:
            return L.linear_kl_divergence(
                input, self.head.weight, teacher, linear_bias=self.head.bias, direction="jsd", chunk_rows=5
            )

    def inputs(rows: int) -> tuple[Tensor, Tensor]:
        given = with_numbers(operands((rows,)))
        return given["input"].detach(), given["teacher"]

    model, rows = Model(), Dim("rows", min=2)
    exported = torch.export.export(model, inputs(23), dynamic_shapes=({0: rows}, {0: rows}))
    decomposed = exported.run_decompositions()
    assert holds(graph_ops(exported), "linear_kl_divergence")
    assert not any("fusedloss" in op for op in graph_ops(decomposed))
    for program in (exported, decomposed):
        for count in (23, 7):
            torch.testing.assert_close(program.module()(*inputs(count)), model(*inputs(count)))


@needs_extension
@pytest.mark.hardware(reason="opcheck knows the CPU, CUDA and XPU")
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(each, marks=MANY) for each in HALVES)], ids=str)
@pytest.mark.parametrize("reduction", [1, pytest.param(0, marks=MANY)])
def test_opcheck(reduction, dtype):
    given = operands(dtype=dtype)
    others = (None, None, 0, 1.0, 0.0, reduction, False, "reverse", "logits", 2.0, 0.5, 5, False)
    wanted = [True, True, True]
    if reduction:
        opcheck(torch.ops.fusedloss.linear_kl_divergence_with_grad.default, (*given.values(), *others, wanted, False))
    opcheck(torch.ops.fusedloss.linear_kl_divergence.default, (*given.values(), *others, False, False, True, False))
    detached = [each.detach() for each in given.values()]
    *_, kept, _ = torch.ops.fusedloss.linear_kl_divergence(*detached, *others, False, False, True, False)
    upstream = torch.ones((23,) if reduction == 0 else (), dtype=dtype)
    opcheck(
        torch.ops.fusedloss.linear_kl_divergence_backward.default,
        (upstream, None, *detached, *others, False, kept, wanted),
    )
