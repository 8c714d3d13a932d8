"""Values and gradients against the native formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from compare import EPSILON, largest_error, value_and_grad
from losses import (
    CROSS_ENTROPY,
    DTYPES,
    FOCAL_WITHOUT_FOCUS,
    GPU,
    INDEXED,
    LOSSES,
    POINTWISE,
    REDUCTIONS,
    SOFTMAX,
    Loss,
    each_of,
    runs_fused,
)
from marks import needs_extension

import fusedloss.functional as L

# Pointwise sizes around a vector, a lane group (32), the block of a float sum (4096) and a chunk (16384).
POINTWISE_SHAPES = [(1,), (2, 3), (31,), (32,), (33,), (4097,), (16385,), (3, 50001)]
# Classes around a vector, the step from columns to rows (24 backward, 120 forward) and a block (4096);
# rows around a lane group and a tile (256), and two long enough to be cut into parts; inner dimensions below and above
# the shortest run in place (32).
SOFTMAX_SHAPES = [
    (1,),
    (7,),
    (200,),
    (1, 1),
    (5, 1),
    (4, 2),
    (33, 10),
    (257, 23),
    (255, 24),
    (31, 33),
    (19, 119),
    (18, 120),
    (17, 1000),
    (3, 4095),
    (3, 4096),
    (2, 8200),
    (1, 50257),
    (2, 131_100),
    (3, 5, 7),
    (2, 3, 40),
    (2, 21, 9, 31),
    (2, 130, 300),
    (1, 300, 3),
]
CASES = [(loss, shape) for loss in LOSSES for shape in (SOFTMAX_SHAPES if loss in SOFTMAX else POINTWISE_SHAPES)]


@pytest.mark.thinned
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, shape", CASES, ids=[f"{loss.name}-{shape}" for loss, shape in CASES])
def test_value_and_gradient_against_float64(loss: Loss, shape, dtype, reduction):
    x, target = loss.data(shape, dtype)
    value, grad, upstream = value_and_grad(loss.fused, x, target, reduction)
    exact_target = target.double() if target.is_floating_point() else target
    exact, exact_grad, _ = value_and_grad(loss.native, x.double(), exact_target, reduction, upstream)
    assert value.dtype == grad.dtype == dtype
    # One rounding of the result in half types; a few of them in the arithmetic otherwise.
    steps = 1.01 if dtype in (torch.bfloat16, torch.float16) else 24
    if dtype == torch.float64 and loss in SOFTMAX:
        steps = 200  # the sums of the native formula are of the same precision, and less careful
    if value.device.type == GPU and loss in POINTWISE and dtype == torch.bfloat16:
        steps *= 2  # the gradient is made in forward, and rounded again by its upstream gradient
    if loss.soft and shape[:2][-1] == 1:
        steps *= 2  # p is 1, and the gradient what a difference leaves of it
    if loss.op == "asymmetric":
        steps *= 2  # what rounds p rounds p - clip, which may be much smaller
    bound = steps * EPSILON[dtype]
    assert largest_error(value, exact) <= bound
    assert largest_error(grad, exact_grad) <= bound
    if reduction == "none":
        assert value.shape == loss.losses_shape(shape)


@needs_extension
@each_of(LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_these_cases_run_fused(loss, dtype):
    shape = (6, 5, 4) if loss in SOFTMAX else (6, 5)
    for reduction in REDUCTIONS:
        assert runs_fused(loss, *loss.data(shape, dtype), reduction)


@pytest.mark.thinned
@pytest.mark.parametrize("gap", [5, 10, 20, 40, 60, 80])
@pytest.mark.parametrize("classes", [2, 10, 150, 5000])
@each_of(
    [
        loss
        for loss in INDEXED
        if loss.op in ("cross_entropy", "focal") and not any(loss.params[2:]) and "0.1" not in loss.name
    ]
)
def test_confident_rows_keep_their_digits(loss, classes, gap):
    x = torch.zeros(3, classes)
    x[:, 1] = gap
    target = torch.ones(3, dtype=torch.long)
    value, grad, _ = value_and_grad(loss.fused, x, target, "none", torch.ones(3))
    # The formula of cross-entropy loses digits even in float64; the focal one does not, and is the same at gamma = 0.
    native = FOCAL_WITHOUT_FOCUS.native if loss.op == "cross_entropy" else loss.native
    exact, exact_grad, _ = value_and_grad(native, x.double(), target, "none", torch.ones(3))
    # Relative to every single number: torch's own float32 loss is 0 from a gap of 17 on.
    normal = exact > 1e-37
    torch.testing.assert_close(value[normal].double(), exact[normal], rtol=3e-5, atol=0)
    normal = exact_grad.abs() > 1e-37
    torch.testing.assert_close(grad[normal].double(), exact_grad[normal], rtol=3e-5, atol=0)
    if loss.op == "cross_entropy" and gap >= 20 and classes == 2:
        assert F.cross_entropy(x, target) == 0 < value[0]


@pytest.mark.parametrize("pos_weight", [None, 3.0])
@pytest.mark.parametrize("gap", [5, 10, 17, 40, 80])
def test_confident_logits_keep_their_digits(gap, pos_weight):
    x, t = torch.tensor([gap, gap, -gap, -gap], dtype=torch.float32), torch.tensor([0.0, 1.0, 0.0, 1.0])
    weight = None if pos_weight is None else torch.tensor(pos_weight)
    value, grad, _ = value_and_grad(
        lambda x, t, r: L.binary_cross_entropy_with_logits(x, t, reduction=r, pos_weight=weight),
        x, t, "none", torch.ones(4),
    )  # fmt: skip
    small, positive = math.log1p(math.exp(-gap)), 1.0 if pos_weight is None else pos_weight
    slope = math.exp(-gap) / (1 + math.exp(-gap))
    exact = torch.tensor([gap + small, positive * small, small, positive * (gap + small)], dtype=torch.float64)
    exact_grad = torch.tensor([1 - slope, -positive * slope, slope, -positive * (1 - slope)], dtype=torch.float64)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=0)
    if gap == 17 and pos_weight is None:
        assert F.binary_cross_entropy_with_logits(x[2], t[2]) == 0 < value[2]


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focal_losses_are_finite_everywhere(gamma, dtype):
    logits = torch.tensor([0.0, 1e-3, 1, 8, 17, 30, 90, 104, 200, 700, 1e4, 3e4], dtype=dtype)
    logits = torch.cat([logits, -logits]).requires_grad_()
    for target in (0.0, 0.5, 1.0):
        loss = L.sigmoid_focal_loss(logits, torch.full_like(logits, target), gamma=gamma, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and grad.isfinite().all() and (loss >= 0).all()
    rows = torch.stack([logits.detach(), torch.zeros_like(logits), -logits.detach()], 1).requires_grad_()
    for target in range(3):
        loss = L.focal_loss(rows, torch.full((len(rows),), target), gamma=gamma, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), rows)
        assert loss.isfinite().all() and grad.isfinite().all() and (loss >= 0).all()


def test_focal_without_focus_is_cross_entropy():
    x, y = torch.randn(9, 13), torch.randint(13, (9,))
    for reduction in REDUCTIONS:
        assert torch.equal(
            L.focal_loss(x, y, gamma=0.0, reduction=reduction), L.cross_entropy(x, y, reduction=reduction)
        )


def test_sigmoid_focal_is_torchvisions():
    x, t = 3 * torch.randn(40, 7, dtype=torch.float64), torch.rand(40, 7, dtype=torch.float64)
    p = torch.sigmoid(x)
    p_t = p * t + (1 - p) * (1 - t)
    expected = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - p_t) ** 2
    expected = (0.25 * t + 0.75 * (1 - t)) * expected
    torch.testing.assert_close(L.sigmoid_focal_loss(x, t), expected)
    torch.testing.assert_close(L.sigmoid_focal_loss(x, t, reduction="sum"), expected.sum())


@pytest.mark.thinned
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 7), (9, 300), (2, 5, 50)])
def test_class_weights(shape, dtype, reduction):
    loss = CROSS_ENTROPY
    x, y = loss.data(shape, dtype)
    weight = torch.rand(shape[1], dtype=torch.float64).to(dtype)
    value, grad, upstream = value_and_grad(lambda x, y, r: L.cross_entropy(x, y, weight, reduction=r), x, y, reduction)
    exact, exact_grad, _ = value_and_grad(
        lambda x, y, r: F.cross_entropy(x, y, weight.double(), reduction=r), x.double(), y, reduction, upstream
    )
    bound = 24 * EPSILON[dtype]
    assert largest_error(value, exact) <= bound and largest_error(grad, exact_grad) <= bound


def test_tensor_alpha_weighs_classes_but_not_the_mean():
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randint(6, (50,))
    alpha = torch.rand(6, dtype=torch.float64)
    y[::5] = -100
    kept = y != -100
    p = torch.softmax(x, 1).gather(1, y.clamp(0)[:, None])[:, 0]
    expected = alpha[y.clamp(0)] * (1 - p) ** 2 * -p.log()
    torch.testing.assert_close(L.focal_loss(x, y, alpha), expected[kept].sum() / kept.sum())
    torch.testing.assert_close(L.focal_loss(x, y, 0.5, reduction="sum"), 0.5 * L.focal_loss(x, y, reduction="sum"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_huber_weight(reduction):
    x, t, w = torch.randn(3, 30, 41).unbind()
    x = x.requires_grad_()
    value, expected = L.huber_loss(x, t, reduction, 0.5, w), F.huber_loss(x, t, reduction, 0.5, w)
    torch.testing.assert_close(value, expected)
    upstream = torch.rand_like(value)
    torch.testing.assert_close(torch.autograd.grad(value, x, upstream), torch.autograd.grad(expected, x, upstream))


def test_fp16_mean_of_many_rows_is_right_where_torchs_is_nan():
    x, y = torch.randn(100_000, 10, dtype=torch.float16), torch.randint(10, (100_000,))
    exact = F.cross_entropy(x.double(), y)
    if x.is_cpu:  # on a GPU torch adds up in float32
        assert F.cross_entropy(x, y).isnan()
    torch.testing.assert_close(L.cross_entropy(x, y).double(), exact, rtol=2**-11, atol=0)
