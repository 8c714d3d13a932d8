"""Linear losses under compilers: one op in the graph, eager's results, open sizes, exports."""

from typing import Any

import pytest
import torch
from compare import upstreams
from linear_calls import IGNORED, ROUTES, WITHIN, call, indices, norm_error, operands, probabilities
from losses import HALVES
from marks import needs_extension
from observe import compiled_with_ops, holds
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fusedloss
import fusedloss.functional as L

FORWARD = {"in forward": "linear_with_grad", "in backward": "linear"}
MANY = pytest.mark.deep("linear losses compiled by other routes and dtypes; one of each kind ran")


def step(function: Any, leaves: tuple[Tensor, ...], target: Tensor, **options: Any) -> list[Tensor]:
    results = function(*leaves, target, **options)
    results = [results] if isinstance(results, Tensor) else list(results)
    differentiable = [each for each in results if each.requires_grad]
    made = torch.autograd.grad(
        differentiable, [leaf for leaf in leaves if leaf.requires_grad], upstreams(*differentiable)
    )
    return [each.detach() for each in (*results, *made)]


def graph_ops(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def cross_entropy(input: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **options: Any) -> Any:
    return L.linear_cross_entropy(input, weight, target, linear_bias=bias, chunk_rows=5, **options)


@needs_extension
@pytest.mark.parametrize(
    ("route", "dtype"),
    [
        ("in forward", torch.float32),
        ("each row, with lse", torch.float32),
        *(
            pytest.param(route, dtype, marks=MANY)
            for route in ROUTES
            for dtype in (torch.float64, torch.float32, *HALVES)
        ),
    ],
)
def test_a_graph_holds_one_op_and_gives_eagers_results(route, dtype):
    compiled, ops = compiled_with_ops(lambda *given: cross_entropy(*given, **ROUTES[route], shift=1))
    leaves, target = operands(dtype=dtype), indices()
    expected = step(cross_entropy, leaves, target, **ROUTES[route], shift=1)
    torch.testing.assert_close(step(compiled, leaves, target), expected)
    assert holds(ops, FORWARD.get(route, "linear")) or dtype in HALVES
    assert not any("mm" in op or "softmax" in op for op in ops)


@needs_extension
@pytest.mark.parametrize("frozen", [(1, 0, 0), (0, 1, 0), pytest.param((0, 1, 1), marks=MANY)], ids=str)
def test_frozen_parts_and_heads_of_any_layout(frozen):
    """Without a bias too: what has no gradient is an empty result of the op."""
    input, weight, bias = operands()
    weight = weight.detach().t().contiguous().t()  # such as the transpose of another parameter
    leaves = [each.detach().requires_grad_(not part) for each, part in zip((input, weight, bias), frozen, strict=True)]
    for given in (leaves, leaves[:2]):
        run = lambda *given: call(given[:-1], given[-1])[0]  # noqa: E731
        compiled, ops = compiled_with_ops(run)
        torch.testing.assert_close(step(compiled, tuple(given), indices()), step(run, tuple(given), indices()))
        assert holds(ops, "linear_with_grad")


@needs_extension
@pytest.mark.hardware(reason="Inductor knows no such device")
@pytest.mark.deep("linear losses by Inductor; AOTAutograd made the same graphs")
@pytest.mark.parametrize("frozen", [False, True])
def test_the_default_compiler(frozen):
    leaves = operands()[:2]
    leaves[1].requires_grad_(not frozen)
    run = lambda *given: call(given[:2], given[2])[0]  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    expected = step(run, leaves, indices())
    for _ in range(2):
        torch.testing.assert_close(step(compiled, leaves, indices()), expected)


@needs_extension
def test_a_head_that_is_a_parameter():
    input, weight, _ = operands()
    head = torch.nn.Parameter(weight.detach())
    run = lambda h, y: L.linear_cross_entropy(h, head, y, chunk_rows=5)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    torch.testing.assert_close(compiled(input, indices()), run(input, indices()))
    assert holds(ops, "linear_with_grad")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_retained_compiled_backward_scales_once(dtype):
    leaves = operands(dtype=dtype)[:2]
    compiled, _ = compiled_with_ops(lambda *given: call(given[:2], given[2])[0])
    loss = compiled(*leaves, indices())
    expected = torch.autograd.grad(call(leaves, indices()), leaves)
    for factor in (2.0, 3.0):
        got = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        torch.testing.assert_close(got, [factor * grad for grad in expected])


@needs_extension
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=MANY)])
@pytest.mark.parametrize("route", ["in forward", *(pytest.param(each, marks=MANY) for each in list(ROUTES)[1:])])
def test_ten_batch_sizes_make_few_graphs(route, dynamic):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *given: cross_entropy(*given, **ROUTES[route]), backend=backend, dynamic=dynamic, fullgraph=True
    )
    for rows in range(30, 10, -2):
        leaves, target = operands((rows,)), indices((rows,))
        torch.testing.assert_close(step(compiled, leaves, target), step(cross_entropy, leaves, target, **ROUTES[route]))
    assert backend.frame_count <= 2


@needs_extension
@MANY
@pytest.mark.parametrize(
    "name", ["linear_focal_loss", "linear_log_probs", "probabilities", "normalizer", "positions", "accuracy"]
)
def test_the_other_functions(name):
    leaves, target = operands(positions=(3,) if name == "positions" else ()), indices()
    options: dict[str, Any] = {
        "linear_log_probs": {"return_entropy": True},
        "accuracy": {"return_lse": True, "return_accuracy": True},
    }.get(name, {})
    if name == "probabilities":
        target = probabilities().float()
    elif name == "positions":
        target = indices(positions=(3,))
    elif name == "normalizer":
        options = {"normalizer": torch.tensor(9.0)}
    function = getattr(L, name if name.startswith("linear") else "linear_cross_entropy")
    run = lambda h, w, b, y: function(h, w, y, linear_bias=b, chunk_rows=5, **options)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    torch.testing.assert_close(step(compiled, leaves, target), step(run, leaves, target))
    assert holds(ops, "linear") or holds(ops, "linear_with_grad")


@needs_extension
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=MANY)])
def test_an_export_keeps_the_op_at_open_sizes_and_decomposes(strict):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = fusedloss.LinearCrossEntropyLoss(6, 11, chunk_rows=5, return_accuracy=True)

        def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            value, accuracy = self.loss(input, target)
            return value, accuracy

    model, rows = Model(), Dim("rows", min=2)
    exported = torch.export.export(
        model, (operands()[0].detach(), indices()), dynamic_shapes=({0: rows}, {0: rows}), strict=strict
    )
    decomposed = exported.run_decompositions()
    assert holds(graph_ops(exported), "linear")
    assert not any("fusedloss" in op for op in graph_ops(decomposed))
    for program in (exported, decomposed):
        for count in (23, 7):
            input, target = operands((count,))[0].detach(), indices((count,))
            target[: count // 2] = model.loss.linear(input[: count // 2]).argmax(1)
            expected = model(input, target)
            assert 0.4 < expected[1] < 1
            torch.testing.assert_close(program.module()(input, target), expected)


@needs_extension
def test_compiled_autograd():
    leaves, target = operands(), indices()
    for route in ("in forward", "each row"):
        expected = step(cross_entropy, leaves, target, **ROUTES[route])[1:]
        for leaf in leaves:
            leaf.grad = None
        results = call(leaves, target, **ROUTES[route])
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            torch.autograd.backward(results, upstreams(*results))
        torch.testing.assert_close([leaf.grad for leaf in leaves], expected)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_a_traced_step_may_run_many_times(route, dtype):
    leaves, target = operands(dtype=dtype), indices()
    upstream = upstreams(*call(leaves, target, **ROUTES[route]))

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(given, target, **ROUTES[route]), given, upstream)

    traced = make_fx(run)(*leaves)
    assert holds(graph_ops(traced), "linear") and holds(graph_ops(traced), "linear_backward")
    for _ in range(2):
        for got, expected in zip(traced(*leaves), run(*leaves), strict=True):
            assert norm_error(got, expected.double()) < WITHIN[dtype]


@needs_extension
@pytest.mark.hardware(reason="opcheck knows the CPU, CUDA and XPU")
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(each, marks=MANY) for each in HALVES)], ids=str)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=MANY)])
def test_opcheck(bias, dtype):
    input, weight, of_classes = operands(dtype=dtype)
    target = indices()
    others = (of_classes if bias else None, target, None, None, None, "cross_entropy", 1, IGNORED, [0.0] * 3, 1.0, 5)
    transposed = weight.detach().t().contiguous().t().requires_grad_()
    wanted, by_classes = [True, True, bias], dtype in HALVES
    for head in (weight, transposed):
        given = (input, head, *others, False, by_classes)
        if not by_classes:
            opcheck(torch.ops.fusedloss.linear_with_grad.default, (*given, wanted, True))
        opcheck(torch.ops.fusedloss.linear.default, (*given, True, True, True, False))
        with torch.no_grad():
            *_, kept, _ = torch.ops.fusedloss.linear(*given, False, False, True, False)
        detached = [each.detach() if isinstance(each, Tensor) else each for each in given]
        upstream = torch.ones((), dtype=dtype)
        opcheck(torch.ops.fusedloss.linear_backward.default, (upstream, None, *detached, False, kept, wanted))
