"""The linear losses under torch.compile, torch.export, torch.func and tracers: the ops stay in the graph."""

import pytest
import torch
import torch.nn.functional as F
from marks import needs_extension
from observe import compiled_with_ops
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fusedloss
import fusedloss.functional as L

pytestmark = needs_extension
EVERY_FORM = pytest.mark.deep("every form of the linear losses compiled; the mean with its gradients ran")


def data(rows: int = 300, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    input = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(300, 8, dtype=dtype, requires_grad=True)
    target = torch.randint(300, (rows,))
    target[::5] = -100
    return input, head, target


@pytest.mark.parametrize(
    ("options", "op"),
    [
        ({}, "linear_with_grad"),
        pytest.param(
            {"reduction": "none"}, "linear", marks=pytest.mark.deep("every form of the linear losses compiled")
        ),
        pytest.param(
            {"return_lse": True, "return_accuracy": True},
            "linear",
            marks=pytest.mark.deep("every form of the linear losses compiled"),
        ),
    ],
    ids=str,
)
def test_compiled_calls_keep_the_op_at_every_size(options, op):
    torch._dynamo.reset()
    call = lambda x, w, y: L.linear_cross_entropy(x, w, y, chunk_rows=70, **options)  # noqa: E731
    compiled, ops = compiled_with_ops(call, dynamic=True)
    for rows in (300, 450):
        input, head, target = data(rows)
        results = []
        for run in (compiled, call):
            made = run(input, head, target)
            made = list(made) if isinstance(made, tuple) else [made]
            grads = torch.autograd.grad(sum(each.sum() * 3 for each in made if each.requires_grad), (input, head))
            results.append([*(each.detach() for each in made), *grads])
        torch.testing.assert_close(*results)
    assert any(f"fusedloss.{op}." in each for each in ops), ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_retained_compiled_backward_counts_once(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, y: L.linear_cross_entropy(x, w, y, chunk_rows=70), backend="aot_eager")
    input, head, target = data(dtype=dtype)
    value = compiled(input, head, target)
    first = torch.autograd.grad(value, (input, head), retain_graph=True)
    second = torch.autograd.grad(2 * value, (input, head))
    torch.testing.assert_close([2 * each for each in first], list(second))


def test_an_exported_program_keeps_the_op_and_open_sizes_and_decomposes():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = fusedloss.LinearCrossEntropyLoss(8, 300, return_accuracy=True)

        def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            value, accuracy = self.loss(input, target)
            return value, accuracy

    model, (input, _, target) = Model(), data()
    with torch.no_grad():
        target[:200] = model.loss.linear(input[:200]).argmax(1)
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, (input.detach(), target), dynamic_shapes=({0: rows}, {0: rows}))
    assert "fusedloss.linear.default" in str(program.graph)
    decomposed = program.run_decompositions()
    assert "fusedloss" not in str(decomposed.graph)
    for rows_given in (300, 250):
        given = input.detach()[:rows_given], target[:rows_given]
        expected = model(*given)
        assert expected[1] > 0.5
        torch.testing.assert_close(program.module()(*given), expected)
        torch.testing.assert_close(decomposed.module()(*given), expected)


def test_transforms_of_torch_func_give_torchs_numbers():
    input, head, target = data(6, torch.float64)
    head = head.detach()[:9]
    target = target % 9
    loss = lambda x: L.linear_cross_entropy(x, head, target, chunk_rows=2)  # noqa: E731
    plain = lambda x: F.cross_entropy(F.linear(x, head), target)  # noqa: E731
    x = input.detach()
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(loss)(x), transform(plain)(x))
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([x, 2 * x])), torch.stack([plain(x), plain(2 * x)]))
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (x,)), torch.func.jvp(plain, (x,), (x,)))


def test_a_traced_graph_of_the_backward_makes_the_logits_again():
    input, head, target = data()
    step = lambda x, w: torch.autograd.grad(L.linear_cross_entropy(x, w, target, chunk_rows=70), (x, w))  # noqa: E731
    graph = make_fx(step)(input, head)
    assert {"fusedloss.linear.default", "fusedloss.linear_backward.default"} <= {
        str(n.target) for n in graph.graph.nodes
    }
    for _ in range(2):
        torch.testing.assert_close(graph(input, head), step(input, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["linear", "linear_with_grad"])
def test_opcheck(op, dtype):
    if op == "linear_with_grad" and dtype == torch.float16:
        return  # no gradient in forward in float16
    input, head, target = data(100, dtype)
    bias = torch.randn(300, dtype=dtype, requires_grad=True)
    call = (input, head, bias, target, None, None, None, "cross_entropy", 1, -100, [0.0, 0.0, 0.0], 1.0, 30, False)
    by_classes = dtype == torch.float16
    rest = (False, [True, True, True], True) if op == "linear_with_grad" else (by_classes, False, True, True, False)
    torch.library.opcheck(getattr(torch.ops.fusedloss, op).default, (*call, *rest))
