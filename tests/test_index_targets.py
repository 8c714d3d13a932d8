"""Sigmoid focal loss over class indices: against its native formula in float64, and that against a one-hot."""

import ctypes
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, NATIVE, REDUCTIONS, needs_extension, on_cpu_alone, value_and_grad
from test_cpu import isas, run_python
from test_edges import layouts
from test_mutants import INDEX, build, needs_compiler
from test_values import EPSILON, largest_error
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L
from fusedloss._library import extension

FORMULA = NATIVE["sigmoid_focal_indexed"]
PARAMS = [(0.25, 2.0), (-1.0, 0.5), (0.7, 0.0)]
# Classes around a vector, a group of lanes (32) and a tile (2048); inner dimensions on both sides of 32; several chunks
# of 16384.
SHAPES = [
    (1, 1),
    (33, 1),
    (7, 3),
    (100, 8),
    (257, 80),
    (5, 33),
    (3, 2047),
    (2, 5000),
    (1, 40000),
    (2, 3, 7),
    (700, 5, 31),
    (3, 5, 40),
    (2, 21, 9, 31),
    (1, 9, 6000),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of every kind: classes, C and a negative for the background, ignored ones over NaN."""
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    y = torch.randint(-1, shape[1] + 1, shape[:1] + shape[2:], generator=generator, device="cpu")
    y.view(-1)[2::7] = -100
    x.masked_fill_((y == -100).unsqueeze(1), float("nan"))
    return x.to(device, dtype), y.to(device)


def one_hot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    named = torch.where((y >= 0) & (y < classes), y, classes)
    return F.one_hot(named, classes + 1)[..., :-1].movedim(-1, 1).to(dtype)


def loss(params=PARAMS[0], **options):
    return lambda x, y, r: L.sigmoid_focal_loss(x, y, *params, r, **options)


def exact_loss(params=PARAMS[0], weight: Tensor | None = None):
    return lambda x, y, r: FORMULA(x, y, None if weight is None else weight.double(), r, -100, *params)


def runs_fused(x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> bool:
    return extension is not None and (
        extension.sigmoid_focal_indexed(x, y, weight, reduction, -100, 0.25, 2.0) is not None
    )


def weights_of(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    ones = (1,) * (len(shape) - 2)
    sizes = {
        "classes": (shape[1], *ones),
        "rows": (shape[0], 1, *shape[2:]),
        "batch": (shape[0], 1, *ones),
        "elements": shape,
        "one": (1,),
    }
    return {name: (torch.rand(size, dtype=torch.float64) + 0.5).to(dtype) for name, size in sizes.items()}


def assert_close_to_float64(function, exact, x: Tensor, y: Tensor, reduction: str) -> None:
    value, grad, upstream = value_and_grad(function, x, y, reduction)
    expected, expected_grad, _ = value_and_grad(exact, x.double().contiguous(), y, reduction, upstream)
    assert value.dtype == grad.dtype == x.dtype
    # One rounding of the result in half types; a few of them in the arithmetic otherwise.
    bound = (1.01 if x.dtype in (torch.bfloat16, torch.float16) else 24) * EPSILON[x.dtype]
    assert largest_error(value, expected) <= bound
    assert largest_error(grad, expected_grad) <= bound


# ---- values


@each_reduction
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_against_float64(shape, dtype, reduction):
    x, y = data(shape, dtype)
    for params in PARAMS:
        assert_close_to_float64(loss(params), exact_loss(params), x, y, reduction)


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set_passes_the_test_above(isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "against_float64", __file__],
        env={**os.environ, "FUSEDLOSS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert run_python(
        "import fusedloss._library as l; print(l.extension.cpu_isa())", FUSEDLOSS_CPU_ISA=isa
    ).strip() == (isa)


@each_reduction
@pytest.mark.parametrize("shape", [(40, 9), (3, 5, 6)], ids=str)
def test_the_native_formula_is_that_of_a_one_hot(shape, reduction):
    x, y = data(shape)
    kept = (y != -100).unsqueeze(1).expand(shape)
    x, t = x.nan_to_num(), one_hot(y, shape[1], torch.float64)
    for alpha, gamma in PARAMS:
        p = x.sigmoid()
        losses = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
        losses = losses * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else losses
        expected = {"sum": losses[kept].sum(), "mean": losses[kept].mean(), "none": losses * kept}[reduction]
        torch.testing.assert_close(exact_loss((alpha, gamma))(x, y, reduction), expected)


@needs_extension
@each_dtype
def test_these_cases_run_fused(dtype):
    for shape in SHAPES:
        x, y = data(shape, dtype)
        for weight in (None, *weights_of(shape, dtype).values()):
            for reduction in REDUCTIONS:
                assert runs_fused(x, y, weight, reduction)


@each_reduction
@each_dtype
@pytest.mark.parametrize("shape", [(33, 1), (257, 80), (2, 5000), (40, 5, 31), (2, 21, 9, 31)], ids=str)
def test_weights(shape, dtype, reduction):
    x, y = data(shape, dtype)
    for weight in weights_of(shape, dtype).values():
        assert_close_to_float64(loss(weight=weight), exact_loss(weight=weight), x, y, reduction)


@each_reduction
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(50, 30), (3, 5, 40), (70, 6, 5), (2, 21, 6, 7), (1, 4, 3, 50)], ids=str)
def test_layouts(shape, weighted, reduction):
    x, y = data(shape)
    of_elements = weights_of(shape, torch.float64)["elements"]
    for name, view in {
        "contiguous": x,
        **layouts(x),
        "classes first": x.movedim(1, 0).contiguous().movedim(0, 1),
    }.items():
        for weight in [of_elements, of_elements[:, :1]] if weighted else [None]:
            expected, expected_grad, upstream = value_and_grad(exact_loss(weight=weight), x, y, reduction)
            leaf = view.detach().requires_grad_()
            value = loss(weight=weight)(leaf, y, reduction)
            (grad,) = torch.autograd.grad(value, leaf, upstream)
            torch.testing.assert_close(value, expected, msg=name)
            torch.testing.assert_close(grad, expected_grad, msg=name)
            assert extension is None or runs_fused(leaf, y, weight, reduction)
            if reduction == "none":
                assert value.stride() == grad.stride() == torch.empty_like(view).stride()


def test_expanded_logits_and_targets():
    row = torch.randn(1, 30, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([3]).expand(8)
    value, expected = loss()(row.expand(8, 30), y, "sum"), exact_loss()(row.expand(8, 30), y, "sum")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, row), torch.autograd.grad(expected, row))


@needs_extension
@on_cpu_alone("about threads of the CPU")
def test_one_and_two_threads_give_the_same_bits():
    before = torch.get_num_threads()
    for shape in [(3000, 80), (3, 21, 100, 100), (1, 200_000)]:
        x, y = data(shape, torch.float32)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([value_and_grad(loss(), x, y, reduction)[:2] for reduction in REDUCTIONS])
        torch.set_num_threads(before)
        for other in results[1:]:
            for (value, grad), (other_value, other_grad) in zip(results[0], other, strict=True):
                assert torch.equal(value, other_value) and torch.equal(grad, other_grad)


# ---- edges


@pytest.mark.parametrize("shape", [(9, 7), (3, 5000), (2, 7, 50)], ids=str)
def test_ignored_rows_may_hold_anything(shape):
    x, y = data(shape, torch.float32)
    ignored = (y == -100).unsqueeze(1).expand_as(x)
    results = []
    for special in (0.0, float("nan"), float("inf"), -float("inf")):
        filled = x.masked_fill(ignored, special)
        results.append([value_and_grad(loss(), filled, y, reduction)[:2] for reduction in REDUCTIONS])
        assert all((grad[ignored] == 0).all() for _, grad in results[-1])
        assert (results[-1][2][0][ignored] == 0).all()
    for other in results[1:]:
        for (value, grad), (other_value, other_grad) in zip(results[0], other, strict=True):
            assert torch.equal(value, other_value) and torch.equal(grad, other_grad)


@pytest.mark.parametrize("shape", [(9, 7), (2, 7, 50)], ids=str)
def test_all_ignored(shape):
    x, y = data(shape, torch.float32)
    y.fill_(-100)
    for function in (loss(), exact_loss()):
        for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
            value, grad, _ = value_and_grad(function, x, y, reduction)
            torch.testing.assert_close(value, torch.full_like(value, expected), equal_nan=True)
            assert (grad == 0).all()


@each_reduction
def test_the_background_is_a_target_of_zeros(reduction):
    x = torch.randn(6, 5, dtype=torch.float64)
    expected = L.sigmoid_focal_loss(x, torch.zeros_like(x), reduction=reduction)
    for background in (5, -1, -99):
        torch.testing.assert_close(loss()(x, torch.full((6,), background), reduction), expected)


def test_any_value_can_be_the_ignored_one():
    x = torch.randn(8, 5)
    for ignored in (2, 5, 9, -1):
        y = torch.tensor([0, 1, ignored, 3, 4, 2, ignored, 5])
        kept = y != ignored
        value = L.sigmoid_focal_loss(x, y, ignore_index=ignored, reduction="mean")
        torch.testing.assert_close(value, L.sigmoid_focal_loss(x[kept], y[kept], reduction="mean"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_other_integers_are_converted(dtype):
    x, y = torch.randn(4, 3), torch.tensor([0, 2, 3, 1])
    torch.testing.assert_close(loss()(x, y.to(dtype), "mean"), loss()(x, y, "mean"))
    y = torch.tensor([0, 255, 3, 1], dtype=torch.uint8)
    expected = loss()(x[[0, 2, 3]], y[[0, 2, 3]].long(), "mean")
    torch.testing.assert_close(L.sigmoid_focal_loss(x, y, reduction="mean", ignore_index=255), expected)


def test_integers_of_the_inputs_shape_are_the_targets_of_elements():
    x, t = torch.randn(4, 3), torch.tensor([[0, 1, 0]] * 4)
    torch.testing.assert_close(loss()(x, t, "none"), loss()(x, t.float(), "none"))


@each_reduction
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0), (4, 0)], ids=str)
def test_empty(shape, reduction):
    x, y = torch.empty(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    value, grad, _ = value_and_grad(loss(), x, y, reduction)
    expected = {"mean": torch.tensor(float("nan")), "sum": torch.tensor(0.0), "none": x}[reduction]
    torch.testing.assert_close(value, expected, equal_nan=True)
    assert grad.shape == x.shape


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 30.0])
@each_dtype
def test_finite_for_every_finite_logit(dtype, gamma):
    logits = torch.tensor([0.0, 1e-3, 1, 8, 17, 30, 90, 104, 700, 3e4], dtype=dtype)
    x = torch.stack([logits, -logits], 1)
    for reduction in ("sum", "none"):
        for target in (0, 1, 2):
            value, grad, _ = value_and_grad(loss((0.25, gamma)), x, torch.full((10,), target), reduction)
            assert (value.isfinite().all() or dtype == torch.float16) and grad.isfinite().all() and (value >= 0).all()


@on_cpu_alone("a GPU tells of it at the next call; tests/cuda_on_cpu/test_indexed.py")
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 50)], ids=str)
def test_a_target_out_of_range_raises(shape):
    x, y = torch.randn(shape, requires_grad=True), torch.full(shape[:1] + shape[2:], 2)
    y[1] = 7
    native = torch.rand(shape[1], *[1] * (x.dim() - 2), requires_grad=True)  # a weight that no kernel takes
    for reduction in REDUCTIONS:
        for weight in (None, native):
            with pytest.raises(IndexError, match="Target 7 is out of bounds."):
                L.sigmoid_focal_loss(x, y, reduction=reduction, weight=weight)
    L.sigmoid_focal_loss(x, y, ignore_index=7)
    if extension is not None:
        arguments = (x.detach(), y, None, 2, -100, [0.25, 2.0])
        with pytest.raises(IndexError, match="Target 7 is out of bounds."):
            torch.ops.fusedloss.sigmoid_focal_indexed_backward(torch.ones(()), *arguments)
        with pytest.raises(IndexError, match="Target 7 is out of bounds."):
            torch.ops.fusedloss.sigmoid_focal_indexed_with_grad(*arguments)


REJECTED = {
    "batch": (lambda x: L.sigmoid_focal_loss(x, torch.tensor([0, 1])), "must be the same as input size"),
    "rank": (lambda x: L.sigmoid_focal_loss(x, torch.zeros(3, 1, dtype=torch.long)), "must be the same as input size"),
    "no classes": (lambda x: L.sigmoid_focal_loss(x[0], torch.tensor(1)), "must be the same as input size"),
    "float indices": (lambda x: L.sigmoid_focal_loss(x, torch.ones(3)), "must be the same as input size"),
    "gamma": (lambda x: L.sigmoid_focal_loss(x, torch.tensor([0, 1, 2]), gamma=-1), "gamma must be at least 0"),
    "reduction": (lambda x: L.sigmoid_focal_loss(x, torch.tensor([0, 1, 2]), reduction="avg"), "avg is not a valid"),
    "weight": (
        lambda x: L.sigmoid_focal_loss(x, torch.tensor([0, 1, 2]), weight=torch.ones(3)),
        "weight must broadcast",
    ),
    "wide weight": (
        lambda x: L.sigmoid_focal_loss(x, x.sigmoid(), weight=torch.ones(2, 3, 4)),
        "weight must broadcast",
    ),
    "normalizer of a sum": (
        lambda x: L.sigmoid_focal_loss(x, x.sigmoid(), reduction="sum", normalizer=2.0),
        "normalizer needs reduction='mean', whose sum it divides, got 'sum'",
    ),
    "normalizers": (
        lambda x: L.sigmoid_focal_loss(x, x.sigmoid(), reduction="mean", normalizer=torch.ones(2)),
        "a tensor of one element, got shape .2,.",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case):
    call, message = REJECTED[case]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 4))


@needs_extension
def test_ops_check_what_they_are_given():
    # torch.ops is public: a wrong call raises, it never reads past a tensor.
    x, y, params = torch.randn(3, 4), torch.tensor([0, 1, 2]), [0.25, 2.0]
    forward, backward = torch.ops.fusedloss.sigmoid_focal_indexed, torch.ops.fusedloss.sigmoid_focal_indexed_backward
    for logits, target, weight, given in [
        (x[0], y[0], None, params),
        (x, y[:2], None, params),
        (x, y.int(), None, params),
        (x, y, torch.ones(3), params),
        (x, y, torch.ones(4).double(), params),
        (x, y, None, [1.0] * 9),
        (x.long(), y, None, params),
    ]:
        with pytest.raises(RuntimeError, match="expected"):
            forward(logits, target, weight, 1, -100, given)
    with pytest.raises(RuntimeError, match="out of range"):
        forward(x, y, None, 1, -100, [0.25, -1.0])
    for upstream in (torch.ones(3), torch.ones((), dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="expected an upstream gradient"):
            backward(upstream, x, y, None, 1, -100, params)
    with pytest.raises(RuntimeError, match="expected an upstream gradient"):
        backward(torch.ones(()), x, y, None, 0, -100, params)
    with pytest.raises(RuntimeError, match="no gradient in forward in Half"):
        torch.ops.fusedloss.sigmoid_focal_indexed_with_grad(x.half(), y, None, 1, -100, params)


# ---- derivatives and the route


@each_reduction
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, reduction):
    x, y = data(shape)
    x = x.nan_to_num().requires_grad_()
    for weight in (None, *weights_of(shape, torch.float64).values()):
        for params in PARAMS:
            function = lambda x: loss(params, weight=weight)(x, y, reduction)  # noqa: B023, E731
            assert gradcheck(function, x) and gradgradcheck(function, x)


def test_a_weight_that_requires_grad_gets_one():
    x, y = data((5, 4))
    x, weight = x.nan_to_num().requires_grad_(), torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: L.sigmoid_focal_loss(x, y, weight=w), (x, weight))
    assert not runs_fused(x, y, weight)


@pytest.mark.parametrize("upstream", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_retain_graph_gives_the_same_gradient_twice(dtype, upstream):
    x, y = data((60, 50), dtype)
    leaf = x.requires_grad_()
    value = loss()(leaf, y, "mean")
    upstream = torch.tensor(upstream, dtype=dtype)
    (first,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, leaf, upstream, retain_graph=True)
    (third,) = torch.autograd.grad(value, leaf, upstream, create_graph=True)
    assert torch.equal(first, kept) and third.requires_grad
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)


def test_an_upstream_gradient_may_be_expanded_or_strided():
    x, y = data((6, 5, 4))
    for upstream in (torch.tensor(3.0).expand(x.shape), torch.rand(4, 5, 6).permute(2, 1, 0)):
        _, grad, _ = value_and_grad(loss(), x, y, "none", upstream)
        torch.testing.assert_close(grad, value_and_grad(exact_loss(), x, y, "none", upstream)[1])


@needs_extension
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(reduction):
    x, y = data((6, 5, 4, 3))
    x = x.nan_to_num()
    ops = torch.ops.fusedloss
    for view in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        torch.stack([x, x], -1)[..., 0],
        x[:, :1].expand_as(x),
    ):
        for weight in (None, torch.rand(5, 1, 1, dtype=torch.float64)):
            rest = (y, weight, reduction, -100, [0.25, 2.0])
            torch.library.opcheck(ops.sigmoid_focal_indexed.default, (view.detach().requires_grad_(), *rest))
            upstream = torch.ones(x.shape if reduction == 0 else (), dtype=x.dtype)
            torch.library.opcheck(ops.sigmoid_focal_indexed_backward.default, (upstream, view, *rest))
    if reduction != 0 and x.is_cpu:
        torch.library.opcheck(ops.sigmoid_focal_indexed_with_grad.default, (x, *rest))


@needs_extension
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_keeps_the_fused_ops_in_one_graph(dynamic):
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    seen = []

    def capture(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, y = data((9, 7), torch.float32)
    module = fusedloss.SigmoidFocalLoss(weight=torch.rand(7))
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=capture), fullgraph=True, dynamic=dynamic)
    for arguments in ((y,), (y, torch.tensor([3.0])), (y.int(),)):
        seen.clear()
        results = []
        for function in (module, compiled):
            leaf = x.clone().requires_grad_()
            value = function(leaf, *arguments)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
        assert "fusedloss.sigmoid_focal_indexed.default" in seen
        assert "fusedloss.sigmoid_focal_indexed_backward.default" in seen


def test_compile_of_what_is_declined_runs_natively():
    torch._dynamo.reset()
    x, y = data((9, 7, 2), torch.float32)
    weight = torch.rand(9, 7, 1)  # neither of rows nor of classes
    compiled = torch.compile(loss(weight=weight), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, "mean"), exact_loss(weight=weight)(x.double(), y, "mean").float())
    assert not runs_fused(x, y, weight)


@needs_extension
def test_export_keeps_the_fused_op():
    x, y = data((9, 7), torch.float32)
    program = torch.export.export(fusedloss.SigmoidFocalLoss(), (x, y))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "fusedloss.sigmoid_focal_indexed.default" in targets
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


def test_declined_calls_run_natively():
    x, y = data((6, 5), torch.float32)
    assert not runs_fused(x.to("meta"), y.to("meta"))
    assert not runs_fused(x, y, reduction="elementwise_mean")
    assert not runs_fused(x, y, torch.ones(5, dtype=torch.float64))
    assert loss()(x.to("meta"), y.to("meta"), "none").shape == x.shape
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert not runs_fused(x.bfloat16(), y)
        torch.testing.assert_close(loss()(x, y, "sum"), exact_loss()(x, y, "sum"))


@needs_extension
@on_cpu_alone("counts the CPU's allocations")
def test_memory_is_the_gradient_and_the_kernels_build_no_one_hot():
    from torch.profiler import ProfilerActivity, profile

    x, y = data((1000, 800), torch.float32)
    x.requires_grad_()
    for reduction in ("sum", "mean"):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            torch.autograd.grad(loss()(x, y, reduction), x)
        events = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert x.nbytes <= sum(max(0, size) for size in events) <= 1.01 * x.nbytes


# ---- options


@each_dtype
def test_normalizer(dtype):
    x, y = data((40, 9), dtype)
    for targets in (y, one_hot(y, 9, dtype)):
        x = x.nan_to_num()
        total, grad, _ = value_and_grad(loss(), x.double(), targets, "sum", torch.tensor(1.0))
        for normalizer in (7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([[7.0]], dtype=torch.float64)):
            function = loss(normalizer=normalizer)
            value, got, _ = value_and_grad(
                function, x, targets.to(y.dtype if targets is y else dtype), "mean", torch.tensor(1.0)
            )
            assert value.shape == () and value.dtype == dtype
            tolerance = {"rtol": 4 * EPSILON[dtype] + 1e-14, "atol": 4 * EPSILON[dtype]}
            torch.testing.assert_close(value.double(), total / 7, **tolerance)
            torch.testing.assert_close(got.double(), grad / 7, **tolerance)


def test_normalizer_is_differentiable():
    x, y = data((5, 4))
    x, normalizer = x.nan_to_num().requires_grad_(), torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    function = lambda x, n: L.sigmoid_focal_loss(x, y, reduction="mean", normalizer=n)  # noqa: E731
    assert gradcheck(function, (x, normalizer)) and gradgradcheck(function, (x, normalizer))


@each_reduction
def test_weights_of_float_targets_broadcast(reduction):
    x, t = torch.randn(2, 6, 5, dtype=torch.float64).sigmoid().unbind()
    for weight in (torch.rand(6, 5), torch.rand(5), torch.rand(6, 1), torch.tensor(2.0)):
        weight = weight.double()
        losses = L.sigmoid_focal_loss(x, t) * weight
        expected = {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]
        torch.testing.assert_close(L.sigmoid_focal_loss(x, t, reduction=reduction, weight=weight), expected)


def test_module():
    x, y = data((6, 5), torch.float32)
    weight = torch.rand(5)
    module = fusedloss.SigmoidFocalLoss(0.3, 1.5, weight=weight, ignore_index=2)
    assert list(module.state_dict()) == ["weight"] and module.weight is weight
    assert list(fusedloss.SigmoidFocalLoss().state_dict()) == []
    assert repr(module) == "SigmoidFocalLoss(alpha=0.3, gamma=1.5, reduction='mean', ignore_index=2)"
    options = {"weight": weight, "ignore_index": 2}
    y = torch.where(y == -100, 2, y)
    for each in (module, pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(each(x, y), L.sigmoid_focal_loss(x, y, 0.3, 1.5, "mean", **options))
        normalized = L.sigmoid_focal_loss(x, y, 0.3, 1.5, "mean", normalizer=3, **options)
        torch.testing.assert_close(each(x, y, torch.tensor(3.0)), normalized)
    assert module.double()(x.double(), y).dtype == torch.float64


# ---- a test of the tests: with one thing wrong in the driver, the comparison with native must fail

MUTANTS = {
    "rows of the first tile alone": ("int64_t outer = begin_ / slab", "int64_t outer = begin_ / slab + (begin_ > 0)"),
    "the background takes a column": ("index >= 0 && index < classes", "index >= 0"),
    "ignored rows summed": ("if (hidden) tile.hide_ignored();", ""),
    "ignored rows with a gradient": ("if (any_ignored && result != PointwiseResult::Sum) tile.clear_ignored();", ""),
    "an ignored row cut by a tile": ("(begin_ - first + inner - 1) / inner : 0", "(begin_ - first) / inner + 1 : 0"),
    "the class of a run": ("(index[k] == class_ ? one_ : S())", "(index[k] == run ? one_ : S())"),
    "a run's weight": (
        "weight_offset(run / layout_.classes, run % layout_.classes, i)",
        "weight_offset(run / layout_.classes, 0, i)",
    ),
    "a class's weight": ("weight_offset(outer, class_, 0)", "weight_offset(outer, 0, 0)"),
}


def agrees_with_native(kernels) -> bool:
    for shape in [(300, 80, 1), (3, 5000, 1), (40, 9, 5), (2, 9, 700)]:
        x, y = data(shape, seed=1)
        for weight in (None, *weights_of(shape, torch.float64).values()):
            strides = (0, 0, 0) if weight is None else weight.expand(shape).stride()
            leaf = x.clone().requires_grad_()
            exact = FORMULA(leaf, y, weight, "none", -100, *PARAMS[0])
            (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
            losses, in_forward, grad = (torch.full_like(x, 77.0) for _ in range(3))
            pointer = lambda t: ctypes.c_void_p(None if t is None else t.data_ptr())  # noqa: E731
            total = kernels.run_indexed(
                INDEX["sigmoid_focal"], 1, (ctypes.c_int64 * 3)(*shape), pointer(x), pointer(y), pointer(weight),
                (ctypes.c_int64 * 3)(*strides), (ctypes.c_double * 2)(*PARAMS[0]), pointer(losses),
                pointer(in_forward), pointer(grad),
            )  # fmt: skip
            close = [
                torch.allclose(torch.tensor(total, dtype=torch.float64), exact.detach().sum(), rtol=1e-12, atol=0),
                torch.allclose(losses, exact.detach(), rtol=1e-12, atol=1e-300),
                torch.allclose(in_forward, exact_grad, rtol=1e-10, atol=1e-300),
                torch.allclose(grad, exact_grad, rtol=1e-10, atol=1e-300),
            ]
            if not all(close):
                return False
    return True


@needs_extension
@needs_compiler
@on_cpu_alone("compiles mutants of the driver for the CPU")
def test_the_driver_as_it_is_agrees(tmp_path):
    assert agrees_with_native(build(tmp_path, None))


@needs_extension
@needs_compiler
@on_cpu_alone("compiles mutants of the driver for the CPU")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, tmp_path):
    assert not agrees_with_native(build(tmp_path, ("cpu/pointwise_indexed.inl", *MUTANTS[mutant])))
