"""Pointwise losses under torch.compile: one graph, with the fused ops of those that are not mere arithmetic, and the
results, dtypes and strides of eager."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import autocast, same, value_and_grads
from layouts import laid_out
from marks import needs_extension
from observe import compiled_with_ops, holds, keeps_op
from pointwise_calls import (
    BINARY,
    BROADCASTING,
    CALLS,
    FUSED_UNDER_AUTOCAST,
    OF_DIFFERENCE,
    PAIRS,
    RAISES,
    data,
    elements,
    fused,
    made,
    random,
)
from torch import Tensor

import fusedloss.functional as L

COMPILED = {call: (call, None) for call in CALLS}
COMPILED.update(
    {f"{call}, float32 target": (call, torch.float32) for call in ("mse", "l1", "smooth l1", "logits", "focal")}
)


@pytest.mark.thinned(1, deep=1)
@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_keeps_the_fused_op_but_of_arithmetic(name, reduction):
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
    name = function.removesuffix("_loss")
    assert holds(ops, name) == holds(ops, f"{name}_backward") == keeps_op(name)


WIDER_WEIGHTS = [
    *(("mse_loss", {"weight": torch.float32}), ("l1_loss", {"weight": torch.float32})),
    (BINARY[1], {"weight": torch.float32}),
    (BINARY[1], {"pos_weight": torch.float32}),
    (BINARY[1], {"weight": torch.float32, "pos_weight": torch.float32}),
    ("sigmoid_focal_loss", {"weight": torch.float32}),
]


@pytest.mark.thinned(1)
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
    if not keeps_op(function.removesuffix("_loss")):  # torch rounds the errors before it weights them
        expected = value_and_grads(lambda x: getattr(F, function)(x, t, **options, reduction=reduction), x)
    same(got, expected)


@pytest.mark.thinned(1, deep=1)
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
        assert any(op.startswith("fusedloss.") for op in ops) == keeps_op(function.removesuffix("_loss"))


@pytest.mark.thinned(1, deep=1)
@needs_extension
@pytest.mark.parametrize("layouts", itertools.product(["contiguous", "channels_last", "sliced"], repeat=2), ids=str)
@pytest.mark.parametrize("call", ["mse", "huber, weight", "bce", "logits, both", "focal"])
def test_compile_keeps_the_strides(call, layouts):
    function, (x, t), options = made(call, (2, 3, 4, 5), torch.float32)
    x, t = laid_out(x, layouts[0]), laid_out(t, layouts[1])
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
    assert any(op.startswith("fusedloss.") for op in ops) == keeps_op(function.removesuffix("_loss"))


@needs_extension
@RAISES
def test_compile_checks_probabilities():
    compiled, ops = compiled_with_ops(L.binary_cross_entropy)
    x, t = data(BINARY[0], (6, 5), torch.float32)
    same(compiled(x, t), F.binary_cross_entropy(x, t))
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        compiled(x + 1, t)
    assert "fusedloss.binary_cross_entropy.default" in ops


# Of the input, and whether half inputs stand beside a float32 target.
MIXED = [(torch.float32, False), (torch.bfloat16, True)]


@needs_extension
@pytest.mark.thinned(1, deep=1)
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("dtype, wide", MIXED, ids=str)
@pytest.mark.parametrize(
    "layouts", [("contiguous",) * 2, ("channels_last", "sliced"), ("expanded columns", "inner transposed")], ids=str
)
@pytest.mark.parametrize("call", ["mse, weight", "huber, weight", "bce, weight", "logits, both", "focal, weight"])
def test_opcheck(call, layouts, dtype, wide, reduction):
    # Every argument of the ops, in any layout: what a compiler is promised is what they return.
    function, (x, t), _ = made(call, (2, 3, 4, 5), dtype, torch.float32)
    if wide and function in ("huber_loss", BINARY[0]):
        pytest.skip("its operands have one dtype; the other calls are mixed")
    _, _, options = made(call, (2, 3, 4, 5), torch.float32)
    op = getattr(torch.ops.fusedloss, function.removesuffix("_loss"))
    backward = getattr(torch.ops.fusedloss, function.removesuffix("_loss") + "_backward")
    params = [value for value in options.values() if not isinstance(value, Tensor)]
    params = [0.25, 2.0] if "focal" in call else params
    x, t = laid_out(x, layouts[0]), laid_out(t, layouts[1])
    given = (t, options["weight"], reduction, params, options.get("pos_weight"), wide)
    torch.library.opcheck(op.default, (x.detach().requires_grad_(), *given))
    upstream = torch.ones_like(op(x, *given))
    for of_target in (False, True)[: 1 if "focal" in call else 2]:
        torch.library.opcheck(backward.default, (upstream, x, *given, None, of_target))
