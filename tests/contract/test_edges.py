"""Layouts, empty and special inputs, and what is rejected: as torch, to the letter."""

import pytest
import torch
import torch.nn.functional as F
from compare import value_and_grad
from layouts import other_memory
from losses import CROSS_ENTROPY, INDEXED, ONE_OF_EACH, POINTWISE, REDUCTIONS, SOFTMAX, each_of, runs_fused
from marks import needs_extension, on_cpu_alone
from torch import nn

import fusedloss
import fusedloss.functional as L


@pytest.mark.thinned
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(50, 30), (7, 150), (3, 5, 40), (2, 150, 6), (2, 21, 6, 7)])
@each_of(ONE_OF_EACH)
def test_layouts(loss, shape, reduction):
    x, target = loss.data(shape, torch.float64)
    expected, expected_grad, upstream = value_and_grad(loss.native, x, target, reduction)
    for name, view in other_memory(x).items():
        view = view.detach().requires_grad_()
        value = loss.fused(view, target, reduction)
        (grad,) = torch.autograd.grad(value, view, upstream)
        torch.testing.assert_close(value, expected, msg=name)
        torch.testing.assert_close(grad, expected_grad, msg=name)


@each_of(INDEXED)
def test_expanded_logits_and_targets(loss):
    row = torch.randn(1, 30, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3]).expand(8)
    value, expected = loss.fused(row.expand(8, 30), target, "sum"), loss.native(row.expand(8, 30), target, "sum")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, row), torch.autograd.grad(expected, row))


@each_of(POINTWISE)
def test_broadcast_inputs(loss):
    x, t = loss.data((6, 5), torch.float64)
    torch.testing.assert_close(loss.fused(x[:1].expand(6, 5), t, "mean"), loss.native(x[:1].expand(6, 5), t, "mean"))
    torch.testing.assert_close(loss.fused(x, t.t().contiguous().t(), "none"), loss.native(x, t, "none"))


@each_of(POINTWISE)
def test_more_dimensions_than_a_kernel_counts(loss):
    x, t = loss.data((2,) * 9, torch.float64)
    reversed_ = t.permute(*range(9)[::-1]).contiguous().permute(*range(9)[::-1])
    for reduction in REDUCTIONS:
        value, grad, upstream = value_and_grad(loss.fused, x, reversed_, reduction)
        expected, expected_grad, _ = value_and_grad(loss.native, x, t, reduction, upstream)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)


@needs_extension
def test_logits_are_read_in_place_whatever_their_strides():
    x, target = CROSS_ENTROPY.data((2, 21, 6, 7), torch.float32)
    for view in other_memory(x).values():
        assert runs_fused(CROSS_ENTROPY, view, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_empty(loss, reduction):
    for shape in [(0, 5), (0, 5, 3), (4, 5, 0)] if loss in SOFTMAX else [(0,), (3, 0)]:
        x, target = loss.data(shape, torch.float32)
        value, grad, _ = value_and_grad(loss.fused, x, target, reduction)
        expected, expected_grad, _ = value_and_grad(loss.native, x, target, reduction)
        torch.testing.assert_close(value, expected, equal_nan=True)
        assert grad.shape == x.shape


@pytest.mark.parametrize("shape", [(9, 7), (9, 200), (2, 7, 50)])
@each_of(INDEXED)
def test_all_ignored(loss, shape):
    x, target = loss.data(shape, torch.float32)
    target.fill_(-100)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
        value, grad, _ = value_and_grad(loss.fused, x, target, reduction)
        torch.testing.assert_close(value, torch.full_like(value, expected), equal_nan=True)
        assert (grad == 0).all()


@pytest.mark.parametrize("shape", [(9, 7), (9, 200), (2, 7, 50)])
@each_of(INDEXED)
def test_ignored_rows_may_hold_anything(loss, shape):
    x, target = loss.data(shape, torch.float32)
    expected, expected_grad, _ = value_and_grad(loss.fused, x, target, "mean")
    ignored = (target == -100).unsqueeze(1).expand_as(x)
    x[ignored] = float("nan")
    value, grad, _ = value_and_grad(loss.fused, x, target, "mean")
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


@pytest.mark.parametrize("shape", [(6, 4), (6, 200), (2, 4, 40)])
def test_a_masked_class_of_probability_zero_adds_nothing(shape):
    x = torch.randn(shape, dtype=torch.float64)
    x[:, 1] = -torch.inf
    target = torch.rand(shape, dtype=torch.float64)
    target[:, 1] = 0
    others = torch.arange(shape[1]) != 1
    value, grad, _ = value_and_grad(lambda x, t, r: L.cross_entropy(x, t, reduction=r), x, target, "mean")
    exact, exact_grad, _ = value_and_grad(
        lambda x, t, r: F.cross_entropy(x, t, reduction=r), x[:, others], target[:, others], "mean"
    )
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad[:, others], exact_grad)
    assert (grad[:, 1] == 0).all() and F.cross_entropy(x, target).isnan()


@pytest.mark.parametrize("shape", [(9, 7), (9, 200), (2, 7, 5, 4)])
def test_byte_targets_are_taken_in_every_shape(shape):
    x, target = CROSS_ENTROPY.data(shape, torch.float32)
    as_bytes = torch.where(target < 0, 255, target).to(torch.uint8)
    weight = torch.rand(shape[1])
    for smoothing in (0.0, 0.1):
        value, grad, _ = value_and_grad(
            lambda x, y, r: L.cross_entropy(x, y, weight, ignore_index=255, label_smoothing=smoothing),  # noqa: B023
            x, as_bytes, "mean",
        )  # fmt: skip
        expected, expected_grad, _ = value_and_grad(
            lambda x, y, r, e=smoothing: L.cross_entropy(x, y, weight, label_smoothing=e),
            x,
            target,
            "mean",  # noqa: B023
        )
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


def test_any_value_can_be_the_ignored_one():
    x, y = torch.randn(8, 5), torch.tensor([0, 1, 2, 3, 4, 2, 2, 9])
    for ignored in (2, 9, -1):
        target = torch.where(y == 9, torch.tensor(ignored), y)
        for function, native in ((L.cross_entropy, F.cross_entropy), (L.focal_loss, None)):
            value = function(x, target, ignore_index=ignored)
            kept = target != ignored
            torch.testing.assert_close(value, (native or function)(x[kept], target[kept]))


@pytest.mark.parametrize("shape", [(6, 4), (6, 200), (1, 4, 40)])
def test_special_logits_are_torchs(shape):
    x, y = torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for special in (float("nan"), float("inf"), -float("inf")):
        for column in (0, 1):
            logits = x.clone()
            logits[:, column] = special
            value, grad, _ = value_and_grad(lambda x, y, r: L.cross_entropy(x, y, reduction=r), logits, y, "none")
            expected, expected_grad, _ = value_and_grad(
                lambda x, y, r: F.cross_entropy(x, y, reduction=r), logits, y, "none"
            )
            torch.testing.assert_close(value, expected, equal_nan=True)
            torch.testing.assert_close(grad, expected_grad, equal_nan=True)
    logits = torch.full(shape, -float("inf"))
    assert L.cross_entropy(logits, y).isnan()
    logits[:, 0] = 0
    assert L.cross_entropy(logits, y) == 0


@pytest.mark.parametrize("delta", [1.0, float("inf")])
def test_special_values_in_huber_are_torchs(delta):
    values = [float("nan"), -1e30, 0.0, 0.5, 1.0, -1.0]
    if delta == 1:
        values += [float("inf"), -float("inf")]  # with an infinite delta torch's loss of infinity is NaN, ours infinity
    x, zero = torch.tensor(values), torch.zeros(len(values))
    value, grad, _ = value_and_grad(lambda x, t, r: L.huber_loss(x, t, r, delta), x, zero, "none")
    expected, expected_grad, _ = value_and_grad(lambda x, t, r: F.huber_loss(x, t, r, delta), x, zero, "none")
    torch.testing.assert_close(value, expected, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, equal_nan=True)


RAISES_LATER = on_cpu_alone(
    "torch's device assert would end the process, and fusedloss raises at the next call: "
    "test_gpu.py::test_a_bad_target_in_mid_training"
)

# What torch rejects, as (the call through a namespace of functions).
BAD_TARGETS = {
    "target out of range": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, 9, 11])),
    "negative target": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, -1, 1]), reduction="none"),
    "target out of range, long rows": lambda f: f.cross_entropy(torch.randn(3, 400), torch.tensor([0, 400, 1])),
    "target out of range, 2d": lambda f: f.cross_entropy(torch.randn(2, 3, 4), torch.full((2, 4), 3), reduction="sum"),
}
REJECTED = {
    "batch size": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1])),
    "target rank": lambda f: f.cross_entropy(torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.long)),
    "target size": lambda f: f.cross_entropy(torch.randn(4, 5, 3), torch.zeros(4, 2, dtype=torch.long)),
    "target dtype": lambda f: f.cross_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.int32)),
    "byte target of the logits' size": lambda f: f.cross_entropy(
        torch.randn(3, 4), torch.zeros(3, 4, dtype=torch.uint8)
    ),
    "integer logits": lambda f: f.cross_entropy(torch.ones(3, 4, dtype=torch.long), torch.tensor([0, 1, 2])),
    "weight length": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(3)),
    "weight dtype": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.ones(4).half()),
    "differentiable weight": lambda f: f.cross_entropy(
        torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2]), torch.ones(4, requires_grad=True)
    ).backward(),
    "smoothing": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), label_smoothing=1.5),
    "reduction": lambda f: f.cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), reduction="average"),
    "huber reduction": lambda f: f.huber_loss(torch.randn(3), torch.randn(3), "average"),
    "huber delta": lambda f: f.huber_loss(torch.randn(3), torch.randn(3), delta=0.0),
    "huber delta nan": lambda f: f.huber_loss(torch.randn(3), torch.randn(3), delta=float("nan")),
    "huber shapes": lambda f: f.huber_loss(torch.randn(3), torch.randn(4)),
    "huber weight": lambda f: f.huber_loss(torch.randn(3), torch.randn(3), weight=torch.ones(2)),
    "huber mixed backward": lambda f: f.huber_loss(
        torch.randn(3, requires_grad=True), torch.randn(3).half()
    ).backward(),
    "no tensor": lambda f: f.huber_loss([1.0], [2.0]),
}


@pytest.mark.parametrize("case", [*REJECTED, *(pytest.param(case, marks=RAISES_LATER) for case in BAD_TARGETS)])
@pytest.mark.filterwarnings("ignore")
def test_rejected_with_torchs_exception_and_text(case):
    call = {**REJECTED, **BAD_TARGETS}[case]
    errors = []
    for functions in (F, L):
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011
            call(functions)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_huber_warns_of_broadcasting_as_torch():
    with pytest.warns(UserWarning, match="Using a target size"):
        L.huber_loss(torch.randn(3, 1), torch.randn(3))


@pytest.mark.parametrize("gamma", [-1.0, -1e-9, float("nan")])
def test_focal_rejects_a_negative_gamma(gamma):
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for call in (
        lambda: L.focal_loss(x, y, gamma=gamma),
        lambda: L.sigmoid_focal_loss(x, x.sigmoid(), gamma=gamma),
        lambda: fusedloss.FocalLoss(gamma=gamma),
        lambda: fusedloss.SigmoidFocalLoss(gamma=gamma),
    ):
        with pytest.raises(ValueError, match=f"gamma must be at least 0, got {gamma}"):
            call()


def test_focal_rejects_what_does_not_fit():
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"a weight for each of 4 classes, got shape \(3,\)"):
        L.focal_loss(x, y, torch.ones(3))
    for call in (lambda: L.focal_loss(x, y, reduction="avg"), lambda: L.sigmoid_focal_loss(x, x, reduction="avg")):
        with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
            call()
    with pytest.raises(ValueError, match="must be the same as input size"):
        L.sigmoid_focal_loss(x, torch.ones(3, 5))


@RAISES_LATER
def test_focal_rejects_a_target_out_of_range():
    with pytest.raises(IndexError, match="Target 4 is out of bounds."):
        L.focal_loss(torch.randn(3, 4), torch.tensor([0, 4, 1]))


@pytest.mark.parametrize("op", ["cross_entropy", "focal"])
@needs_extension
def test_ops_check_what_they_are_given(op):
    # torch.ops is public: a wrong call raises, it never reads past a tensor.
    op = getattr(torch.ops.fusedloss, op)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for target, weight, params in [
        (y[:2], None, [1.0, 2.0]),
        (y.int(), None, [1.0, 2.0]),
        (y, torch.ones(3), [1.0, 2.0]),
        (y, None, [1.0] * 9),
    ]:
        with pytest.raises(RuntimeError, match="expected"):
            op(x, target, weight, 1, -100, params)
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        torch.ops.fusedloss.huber(x, x[:2], None, 1, [1.0])


@pytest.mark.parametrize("op", ["cross_entropy", "focal"])
@needs_extension
@RAISES_LATER
def test_ops_reject_a_target_out_of_range(op):
    with pytest.raises(IndexError, match="Target 7"):
        getattr(torch.ops.fusedloss, op)(torch.randn(3, 4), torch.tensor([0, 7, 1]), None, 1, -100, [1.0, 2.0])


def test_modules_are_torchs_modules():
    weight = torch.rand(4)
    for module, native in (
        (fusedloss.CrossEntropyLoss(weight, ignore_index=1), nn.CrossEntropyLoss(weight, ignore_index=1)),
        (fusedloss.HuberLoss(delta=0.3), nn.HuberLoss(delta=0.3)),
    ):
        assert isinstance(module, type(native)) and repr(module) == repr(native)
        assert module.state_dict().keys() == native.state_dict().keys()
        x = torch.randn(3, 4)
        target = torch.tensor([0, 1, 2]) if isinstance(module, nn.CrossEntropyLoss) else torch.randn(3, 4)
        torch.testing.assert_close(module(x, target), native(x, target))
        assert type(torch.jit.script(module)).__name__ == "RecursiveScriptModule"
    module = fusedloss.FocalLoss(alpha=weight)
    assert list(module.state_dict()) == ["alpha"] and module.half().alpha.dtype == torch.float16
    assert list(fusedloss.FocalLoss(alpha=0.25).state_dict()) == []
    assert repr(fusedloss.SigmoidFocalLoss()) == "SigmoidFocalLoss(alpha=0.25, gamma=2.0, reduction='mean')"
