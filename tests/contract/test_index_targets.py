"""Sigmoid focal loss over class indices: against its native formula in float64, and that against a one-hot."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import EPSILON, largest_error, value_and_grad
from index_calls import PARAMS, data, exact_loss, loss, one_hot, runs_fused, weights_of
from layouts import other_memory
from losses import DTYPES, REDUCTIONS, extension
from marks import needs_extension, on_cpu_alone
from observe import bytes_allocated
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

# Classes around a vector, a group of lanes (32) and a tile (2048), and a single one, whose rows lie side by side; inner
# dimensions on both sides of 32; several chunks of 16384.
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
    (3, 1, 5),
    (2, 1, 4, 9),
    (700, 5, 31),
    (3, 5, 40),
    (2, 21, 9, 31),
    (1, 9, 6000),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def assert_close_to_float64(function, exact, x: Tensor, y: Tensor, reduction: str) -> None:
    value, grad, upstream = value_and_grad(function, x, y, reduction)
    expected, expected_grad, _ = value_and_grad(exact, x.double().contiguous(), y, reduction, upstream)
    assert value.dtype == grad.dtype == x.dtype
    # One rounding of the result in half types; a few of them in the arithmetic otherwise.
    bound = (1.01 if x.dtype in (torch.bfloat16, torch.float16) else 24) * EPSILON[x.dtype]
    assert largest_error(value, expected) <= bound
    assert largest_error(grad, expected_grad) <= bound


# ---- values


@pytest.mark.thinned
@each_reduction
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_against_float64(shape, dtype, reduction):
    x, y = data(shape, dtype)
    for params in PARAMS:
        assert_close_to_float64(loss(params), exact_loss(params), x, y, reduction)


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


@pytest.mark.thinned
@each_reduction
@each_dtype
@pytest.mark.parametrize("shape", [(33, 1), (257, 80), (2, 5000), (40, 5, 31), (2, 21, 9, 31)], ids=str)
def test_weights(shape, dtype, reduction):
    x, y = data(shape, dtype)
    for weight in weights_of(shape, dtype).values():
        assert_close_to_float64(loss(weight=weight), exact_loss(weight=weight), x, y, reduction)


@pytest.mark.thinned
@each_reduction
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(50, 30), (3, 1, 40), (3, 5, 40), (70, 6, 5), (2, 21, 6, 7), (1, 4, 3, 50)], ids=str)
def test_layouts(shape, weighted, reduction):
    x, y = data(shape)
    of_elements = weights_of(shape, torch.float64)["elements"]
    for name, view in {
        "contiguous": x,
        **other_memory(x),
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


@on_cpu_alone("a GPU tells of it at the next call; kernels/test_indexed_cuda.py")
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
        arguments = (x.detach(), y, None, 2, [0.25, 2.0], None, False, -100)
        with pytest.raises(IndexError, match="Target 7 is out of bounds."):
            torch.ops.fusedloss.sigmoid_focal_backward(torch.ones(()), *arguments)
        with pytest.raises(IndexError, match="Target 7 is out of bounds."):
            torch.ops.fusedloss.sigmoid_focal_with_grad(*arguments)


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
    forward, backward = torch.ops.fusedloss.sigmoid_focal, torch.ops.fusedloss.sigmoid_focal_backward
    indices = {"ignore_index": -100}
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
            forward(logits, target, weight, 1, given, **indices)
    with pytest.raises(RuntimeError, match="out of range"):
        forward(x, y, None, 1, [0.25, -1.0], **indices)
    for upstream in (torch.ones(3), torch.ones((), dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="expected an upstream gradient"):
            backward(upstream, x, y, None, 1, params, **indices)
    with pytest.raises(RuntimeError, match="expected an upstream gradient"):
        backward(torch.ones(()), x, y, None, 0, params, **indices)
    with pytest.raises(RuntimeError, match="no gradient in forward in Half"):
        torch.ops.fusedloss.sigmoid_focal_with_grad(x.half(), y, None, 1, params, **indices)


# ---- derivatives and the route


@pytest.mark.thinned
@each_reduction
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("weighted", ["none", *weights_of((5, 4), torch.float64)])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, weighted, params, reduction):
    x, y = data(shape)
    x = x.nan_to_num().requires_grad_()
    weight = weights_of(shape, torch.float64).get(weighted)
    function = lambda x: loss(params, weight=weight)(x, y, reduction)  # noqa: E731
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
    x, y = data((1000, 800), torch.float32)
    x.requires_grad_()
    for reduction in ("sum", "mean"):
        train = lambda: torch.autograd.grad(loss()(x, y, reduction), x)  # noqa: B023, E731
        assert x.nbytes <= bytes_allocated(train) <= 1.01 * x.nbytes


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
