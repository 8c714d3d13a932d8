"""Under autocast and torch.compile, and over any number of threads."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, REDUCTIONS, Recorder, needs_extension, on_cpu_alone
from pointwise_calls import (
    BINARY,
    BROADCASTING,
    CALLS,
    EVERY_DTYPE,
    EVERY_HALF,
    EVERY_REDUCTION,
    LAYOUTS,
    OF_DIFFERENCE,
    OF_TORCH,
    PAIRS,
    RAISES,
    as_double,
    data,
    elements,
    fused,
    made,
    outcome,
    random,
    same,
    upstream_of,
    value_and_grads,
)
from torch import Tensor

import fusedloss.functional as L

# ---- autocast


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


AUTOCAST = [pytest.param(call, marks=on_cpu_alone("torch refuses it")) if "bce" in call else call for call in OF_TORCH]
# Beside a weight autocast takes torch's mse and l1 step by step, and so do ours, natively.
FUSED_UNDER_AUTOCAST = [call for call in AUTOCAST if call not in ("mse, weight", "l1, weight")]


@pytest.mark.parametrize("other", [None, torch.float32], ids=["half target", "float32 target"])
@EVERY_REDUCTION
@pytest.mark.parametrize("call", AUTOCAST)
@EVERY_HALF
def test_autocast_gives_float32_no_less_exact_than_torchs(dtype, call, reduction, other):
    function, tensors, options = made(call, (40, 30), dtype, other)
    if function in ("mse_loss", "l1_loss") and options:
        # Beside a half one torch's losses are half too, because autocast leaves the operators it is made of alone.
        options["weight"] = options["weight"].float()
    exact = value_and_grads(
        lambda *given: getattr(F, function)(*given, **as_double(options), reduction=reduction),
        *(each.double() for each in tensors),
    )
    with autocast(dtype):
        ours = value_and_grads(getattr(L, function), *tensors, **options, reduction=reduction)
        torchs = value_and_grads(getattr(F, function), *tensors, **options, reduction=reduction)
    assert ours[0].dtype == torchs[0].dtype == torch.float32
    for tensor, of_ours, of_torchs in zip(tensors, ours[1:], torchs[1:], strict=True):
        assert of_ours.dtype == of_torchs.dtype == tensor.dtype
    for got, of_torch, expected in zip(ours, torchs, exact, strict=True):
        hair = 8 * 2**-24 if got.dtype == torch.float32 else 0.01 * torch.finfo(dtype).eps
        assert error(got, expected) <= error(of_torch, expected) + hair


@needs_extension
@pytest.mark.parametrize("call", [*FUSED_UNDER_AUTOCAST, "focal", "focal, weight"])
@EVERY_HALF
def test_autocast_runs_fused_without_a_cast(dtype, call):
    function, (x, t), options = made(call, (6, 5), dtype)
    x.requires_grad_()
    with autocast(dtype), Recorder() as recorder:
        loss = getattr(L, function)(x, t, **options, reduction="sum")
        assert fused(function, x, t, **options, reduction="sum")
    name = function.removesuffix("_loss")
    with_grad = "_with_grad" * (dtype == torch.bfloat16)
    assert loss.dtype == torch.float32
    assert recorder.seen == [f"fusedloss.{name}{with_grad}.default"]


@pytest.mark.parametrize("call", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_leaves_wider_inputs_alone(dtype, call):
    function, tensors, options = made(call, (6, 5), dtype)
    plain = value_and_grads(getattr(L, function), *tensors, **options)
    with autocast(torch.bfloat16):
        got = value_and_grads(getattr(L, function), *tensors, **options)
        of_torch = getattr(F, function)(*tensors, **options)
    assert all(torch.equal(*each) and each[0].dtype == dtype for each in zip(got, plain, strict=True))
    assert of_torch.dtype == dtype


@pytest.mark.parametrize("call", AUTOCAST)
@EVERY_DTYPE
def test_autocast_dtypes(dtype, call):
    different = []
    for other, of_weight, reduction in itertools.product([*DTYPES, torch.int64], DTYPES, REDUCTIONS):
        function, (x, t), options = made(call, (6, 5), dtype, other)
        given = {k: v.to(of_weight) if isinstance(v, Tensor) else v for k, v in options.items()}
        with autocast(torch.bfloat16):
            ours, torchs = (outcome(lambda: getattr(f, function)(x, t, **given, reduction=reduction)) for f in (L, F))  # noqa: B023
        if ours != torchs:
            different.append((other, of_weight, reduction, ours, torchs))
    assert different == []


@pytest.mark.parametrize("call", FUSED_UNDER_AUTOCAST)
@EVERY_HALF
def test_a_double_backward_of_what_ran_under_autocast(dtype, call):
    function, tensors, options = made(call, (4, 3), dtype)
    seconds = []
    for enabled, given, factors in (
        (True, tensors, options),
        (False, [each.double() for each in tensors], as_double(options)),
    ):
        leaves = [each.detach().requires_grad_() for each in given]
        with torch.autocast(leaves[0].device.type, dtype=dtype, enabled=enabled):
            value = getattr((F, L)[enabled], function)(*leaves, **factors, reduction="sum")
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        found = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        seconds.append([value.detach(), *grads, *found])
    assert [each.dtype for each in seconds[0]] == [torch.float32] + [dtype] * 4
    for one, other in zip(*seconds, strict=True):
        same(one.detach().double(), other.detach(), rtol=0.05, atol=0.05)


# ---- torch.compile

COMPILED = {call: (call, None) for call in CALLS}
COMPILED.update(
    {f"{call}, float32 target": (call, torch.float32) for call in ("mse", "l1", "smooth l1", "logits", "focal")}
)


def compiled_with_ops(run: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[str]]:
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    return torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True), ops


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_keeps_the_fused_op(name, reduction):
    call, other = COMPILED[name]
    dtype = torch.float32 if other is None else torch.bfloat16
    function, tensors, options = made(call, (6, 5), dtype, other)
    targets = 0 if "focal" in call else 1
    run = lambda *given: getattr(L, function)(*given, *tensors[len(given) :], **options, reduction=reduction)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    for leaves in (tensors[:1], tensors[: 1 + targets]):  # without and with a gradient of the target
        got, expected = value_and_grads(compiled, *leaves), value_and_grads(run, *leaves)
        for one, wanted in zip(got, expected, strict=True):
            assert one.dtype == wanted.dtype
        same(got, expected)
    fused_ops = [op for op in ops if op.startswith("fusedloss.")]
    assert f"fusedloss.{function.removesuffix('_loss')}.default" in fused_ops
    assert f"fusedloss.{function.removesuffix('_loss')}_backward.default" in fused_ops


WIDER_WEIGHTS = [
    *(("mse_loss", {"weight": torch.float32}), ("l1_loss", {"weight": torch.float32})),
    (BINARY[1], {"weight": torch.float32}),
    (BINARY[1], {"pos_weight": torch.float32}),
    (BINARY[1], {"weight": torch.float32, "pos_weight": torch.float32}),
    ("sigmoid_focal_loss", {"weight": torch.float32}),
]


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function, weights", WIDER_WEIGHTS, ids=str)
def test_compile_gives_the_dtype_of_eager_beside_wider_weights(function, weights, reduction, dtype=torch.bfloat16):
    x, t = data(function if "focal" not in function else BINARY[1], (6, 5), dtype)
    options = {name: elements((6, 5), each) for name, each in weights.items()}
    run = lambda x: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    compiled, _ = compiled_with_ops(run)
    expected, got = value_and_grads(run, x), value_and_grads(compiled, x)
    assert fused(function, x, t, **options, reduction=reduction)
    assert [each.dtype for each in got] == [each.dtype for each in expected]
    same(got, expected)


@needs_extension
@pytest.mark.parametrize("sizes", PAIRS[1:5], ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_compile_broadcasts(function, sizes):
    x, t = random(*sizes[0], seed=1), random(*sizes[1], seed=2)
    for reduction in ("mean", "none"):
        run = lambda x, t: getattr(L, function)(x, t, reduction=reduction)  # noqa: B023, E731
        compiled, ops = compiled_with_ops(run)
        same(value_and_grads(compiled, x, t), value_and_grads(run, x, t))
        assert any(op.startswith("fusedloss.") for op in ops)


@needs_extension
@pytest.mark.parametrize("layouts", itertools.product(["contiguous", "channels_last", "sliced"], repeat=2), ids=str)
@pytest.mark.parametrize("call", ["mse", "huber, weight", "bce", "logits, both", "focal"])
def test_compile_keeps_the_strides(call, layouts):
    function, (x, t), options = made(call, (2, 3, 4, 5), torch.float32)
    x, t = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](t)
    compiled, _ = compiled_with_ops(lambda x, t: getattr(L, function)(x, t, **options, reduction="none"))
    same(compiled(x, t), getattr(L, function)(x, t, **options, reduction="none"), check_stride=True)


@needs_extension
@pytest.mark.parametrize("call", FUSED_UNDER_AUTOCAST)
def test_compile_under_autocast(call):
    function, tensors, options = made(call, (6, 5), torch.bfloat16)
    run = lambda *given: getattr(L, function)(*given, **options)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    with autocast(torch.bfloat16):
        got, expected = value_and_grads(compiled, *tensors), value_and_grads(run, *tensors)
    assert [each.dtype for each in got] == [each.dtype for each in expected]
    same(got, expected)
    assert any(op.startswith("fusedloss.") for op in ops)


@needs_extension
@RAISES
def test_compile_checks_probabilities():
    compiled, ops = compiled_with_ops(L.binary_cross_entropy)
    x, t = data(BINARY[0], (6, 5), torch.float32)
    same(compiled(x, t), F.binary_cross_entropy(x, t))
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        compiled(x + 1, t)
    assert "fusedloss.binary_cross_entropy.default" in ops


@needs_extension
@pytest.mark.parametrize(
    "layouts", [("contiguous",) * 2, ("channels_last", "sliced"), ("expanded", "transposed")], ids=str
)
@pytest.mark.parametrize("call", ["mse, weight", "huber, weight", "bce, weight", "logits, both", "focal, weight"])
def test_opcheck(call, layouts):
    # Every argument of the ops, in any layout: what a compiler is promised is what they return.
    function, _, options = made(call, (2, 3, 4, 5), torch.float32)
    op = getattr(torch.ops.fusedloss, function.removesuffix("_loss"))
    backward = getattr(torch.ops.fusedloss, function.removesuffix("_loss") + "_backward")
    params = [value for value in options.values() if not isinstance(value, Tensor)]
    params = [0.25, 2.0] if "focal" in call else params
    mixed = [(torch.float32, False), *([(torch.bfloat16, True)] if function not in ("huber_loss", BINARY[0]) else [])]
    for (dtype, wide), reduction in itertools.product(mixed, (0, 1)):
        x, t = made(call, (2, 3, 4, 5), dtype, torch.float32)[1]
        x, t = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](t)
        given = (t, options["weight"], reduction, params, options.get("pos_weight"), wide)
        torch.library.opcheck(op.default, (x.detach().requires_grad_(), *given))
        upstream = torch.ones_like(op(x, *given))
        for of_target in (False, True)[: 1 if "focal" in call else 2]:
            torch.library.opcheck(backward.default, (upstream, x, *given, of_target))


# ---- threads

STRIDED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sliced": lambda x, t: (LAYOUTS["sliced"](x), t),
    "channels_last beside contiguous": lambda x, t: (LAYOUTS["channels_last"](x), t),
    "transposed": lambda x, t: (LAYOUTS["transposed"](x), LAYOUTS["transposed"](t)),
    "expanded": lambda x, t: (x, LAYOUTS["expanded"](t)),
    "mixed": lambda x, t: (x.bfloat16(), t),
    "mixed and sliced": lambda x, t: (LAYOUTS["sliced"](x.half()), LAYOUTS["channels_last"](t)),
    "broadcast": lambda x, t: (x, t[:, :1, :, :1]),
}


@needs_extension
@on_cpu_alone("about the CPU's threads")
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize(
    "call", ["mse", "l1, weight", "smooth l1", "huber, weight", "bce, weight", "logits, both", "focal"]
)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_any_number_of_threads_gives_the_same_bits(call, layout):
    function, _, options = made(call, (4, 8, 61, 113), torch.float32)
    x, t = STRIDED[layout](*made(call, (4, 8, 61, 113), torch.float32)[1])
    if "broadcast" in layout and function not in OF_DIFFERENCE:
        pytest.skip("its operands have one size")
    if "mixed" in layout and function in ("huber_loss", "binary_cross_entropy"):
        pytest.skip("its operands have one dtype")
    assert fused(function, x, t, **options)
    leaves = [x.detach().requires_grad_()]
    if "focal" not in call:
        leaves.append(t.detach().requires_grad_())
        t = leaves[1]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for reduction in REDUCTIONS:
            value = getattr(L, function)(leaves[0], t, **options, reduction=reduction)
            results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
    torch.set_num_threads(before)
    for i, result in enumerate(results[3:]):
        for one, other in zip(result, results[i % 3], strict=True):
            assert torch.equal(one, other)
