"""The asymmetric loss, and binary cross-entropy of smoothed class indices: the published formulas, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from compare import same, value_and_grads
from losses import REDUCTIONS
from marks import needs_extension, on_cpu_alone
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

PARAMS = [(4.0, 1.0, 0.05), (2.0, 2.0, 0.0), (0.0, 0.0, 0.3), (2.0, 3.0, 1.0)]
BELOW_ONE = (0.5, 0.3, 0.05)  # where the published gradient of what is forgiven is NaN
EVERY_PARAMS = pytest.mark.parametrize("params", [*PARAMS, BELOW_ONE], ids=str)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)


def published(x, y, gamma_neg, gamma_pos, clip, reduction, eps=1e-300):
    """As the authors' code and timm's write it, step by step, but for the bound of the logarithms."""
    positive = torch.sigmoid(x)
    negative = 1 - positive
    if clip > 0:
        negative = (negative + clip).clamp(max=1)
    loss = y * torch.log(positive.clamp(min=eps)) + (1 - y) * torch.log(negative.clamp(min=eps))
    if gamma_neg > 0 or gamma_pos > 0:
        wrong = 1 - positive * y - negative * (1 - y)
        loss = loss * torch.pow(wrong, gamma_pos * y + gamma_neg * (1 - y))
    return {"none": -loss, "sum": -loss.sum(), "mean": -loss.mean()}[reduction]


def data(kind, shape=(20, 7)):
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.rand(shape, generator=generator, dtype=torch.float64)
    return x, t if kind == "soft" else t.round()


@pytest.mark.parametrize("params", PARAMS, ids=str)
@EVERY_REDUCTION
@pytest.mark.parametrize("kind", ["certain", "soft"])
def test_the_published_formula(params, reduction, kind):
    x, t = data(kind)
    ours = value_and_grads(lambda x: L.asymmetric_loss(x, t, *params, reduction), x)
    same(ours, value_and_grads(lambda x: published(x, t, *params, reduction), x), rtol=1e-11, atol=1e-13)
    module = fusedloss.AsymmetricLoss(*params, reduction=reduction)
    same(ours, value_and_grads(lambda x: module(x, t), x))


@EVERY_PARAMS
@EVERY_REDUCTION
def test_class_indices_are_their_one_hot(params, reduction):
    x, _ = data("soft")
    y = torch.arange(20) % 8  # the last one is the background
    one_hot = F.one_hot(y, 8)[:, :7].double()
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    ours = value_and_grads(lambda x: L.asymmetric_loss(x, y, *params, reduction, weight=weight), x)
    same(ours, value_and_grads(lambda x: L.asymmetric_loss(x, one_hot, *params, reduction, weight=weight), x))
    y[3] = y[11] = -100
    kept = y != -100
    ours = L.asymmetric_loss(x, y, *params, reduction)
    if reduction == "none":
        assert (ours[~kept] == 0).all()
        ours = ours[kept]
    same(ours, L.asymmetric_loss(x[kept], one_hot[kept], *params, reduction))


@EVERY_PARAMS
@pytest.mark.parametrize("kind", ["certain", "soft", "indices"])
def test_gradcheck(params, kind):
    x, t = data(kind, (4, 3))
    t = torch.tensor([0, 2, 3, -100]) if kind == "indices" else t
    x = x.requires_grad_()
    for reduction in REDUCTIONS:
        assert gradcheck(lambda x: L.asymmetric_loss(x, t, *params, reduction), x)  # noqa: B023
        assert gradgradcheck(lambda x: L.asymmetric_loss(x, t, *params, reduction), x)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@EVERY_PARAMS
def test_confident_logits_have_finite_values_and_gradients(params, dtype):
    x = torch.tensor([1000.0, -1000.0, 104.0, -104.0, 0.0, 60.0, -60.0]).to(dtype).repeat(2)
    t = torch.tensor([0.0, 1.0]).repeat_interleave(7).to(dtype)
    native = fusedloss._route.LOSSES["asymmetric"].native
    for loss in (
        lambda x: L.asymmetric_loss(x, t, *params, "none"),
        lambda x: native(x, t, None, "none", *params),
    ):
        value, grad = value_and_grads(loss, x)
        assert value.isfinite().all() and grad.isfinite().all()
        # Nothing bounds the loss of a positive; that of a negative is at most -log(clip).
        assert grad[8] < 0 and (grad[0] > 0) == (params[2] == 0)


@needs_extension
def test_runs_fused_and_what_has_no_kernel_natively():
    x, t = data("certain")
    assert fusedloss.explain(L.asymmetric_loss, x, t).startswith("fused")
    assert fusedloss.explain(L.asymmetric_loss, x, torch.arange(20) % 7).startswith("fused")
    assert fusedloss.explain(L.asymmetric_loss, x, t.requires_grad_()).startswith("native")
    smoothed = {"ignore_index": -100, "label_smoothing": 0.1}
    logits = L.binary_cross_entropy_with_logits
    assert fusedloss.explain(logits, x, torch.arange(20) % 7, **smoothed).startswith("fused")
    assert fusedloss.explain(logits, x, torch.arange(20) % 7, pos_weight=x[0].exp(), **smoothed).startswith("native")


def test_the_gradient_of_a_target_is_that_of_the_formula():
    x, t = data("soft", (4, 3))
    assert gradcheck(lambda t: L.asymmetric_loss(x, t, 3.0, 1.0, 0.1), t.requires_grad_())


@pytest.mark.parametrize("name", ["gamma_neg", "gamma_pos", "clip"])
@pytest.mark.parametrize("make", [fusedloss.AsymmetricLoss, lambda **o: L.asymmetric_loss(*data("soft"), **o)])
def test_parameters_out_of_range(name, make):
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"{name} must .*, got {value}"):
            make(**{name: value})
    with pytest.raises(TypeError, match=f"argument '{name}' must be float, not str"):
        make(**{name: "1"})


def test_bad_input_is_named():
    x, t = data("soft")
    with pytest.raises(ValueError, match="clip must lie between 0 and 1, got 1.5"):
        L.asymmetric_loss(x, t, clip=1.5)
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        L.asymmetric_loss(x, t, reduction="foo")
    with pytest.raises(ValueError, match=r"Target size \(torch.Size\(\[7\]\)\) must be the same as input size"):
        L.asymmetric_loss(x, t[0])
    with pytest.raises(ValueError, match="weight must broadcast"):
        L.asymmetric_loss(x, t, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0.0 and 1.0. Got: 1.5"):
        L.binary_cross_entropy_with_logits(x, torch.arange(20) % 7, ignore_index=-100, label_smoothing=1.5)
    with pytest.raises(ValueError, match="label_smoothing needs class indices"):
        L.binary_cross_entropy_with_logits(x, t, label_smoothing=0.1)


@on_cpu_alone("on a GPU the loss is NaN, and check() raises")
@pytest.mark.parametrize("function", ["asymmetric_loss", "binary_cross_entropy_with_logits"])
def test_an_index_above_the_background_raises(function):
    x, _ = data("soft")
    options = {} if function == "asymmetric_loss" else {"label_smoothing": 0.1}
    with pytest.raises(IndexError, match="Target 8 is out of bounds"):
        getattr(L, function)(x, torch.full((20,), 8), ignore_index=-100, **options)


def timms(x, y, smoothing, threshold, reduction, weight=None, pos_weight=None):
    """timm's BinaryCrossEntropy over class indices: a one-hot of off and on."""
    classes = x.shape[-1]
    off = smoothing / classes
    target = torch.full((len(y), classes), off, dtype=x.dtype).scatter_(1, y[:, None], 1.0 - smoothing + off)
    if threshold is not None:
        target = target.gt(threshold).to(target.dtype)
    return F.binary_cross_entropy_with_logits(x, target, weight, pos_weight=pos_weight, reduction=reduction)


@EVERY_REDUCTION
@pytest.mark.parametrize("threshold", [None, 0.2, 0.0, 0.99])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7, 1.0])
def test_smoothed_class_indices_are_timms(smoothing, threshold, reduction):
    x, _ = data("soft")
    y = torch.arange(20) % 7
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    options = {"ignore_index": -100, "label_smoothing": smoothing, "target_threshold": threshold}
    for factors in ({}, {"weight": weight}, {"pos_weight": weight}):
        ours = value_and_grads(
            lambda x: L.binary_cross_entropy_with_logits(x, y, reduction=reduction, **options, **factors),  # noqa: B023
            x,
        )
        same(ours, value_and_grads(lambda x: timms(x, y, smoothing, threshold, reduction, **factors), x))  # noqa: B023
    module = fusedloss.BCEWithLogitsLoss(reduction=reduction, **options)
    same(module(x, y), timms(x, y, smoothing, threshold, reduction))


def test_a_threshold_of_floating_point_targets_leaves_ignored_elements():
    x, t = data("soft")
    t[0, 0] = t[5, 2] = -1
    options = {"ignore_index": -1, "target_threshold": 0.5}
    kept = t != -1
    expected = F.binary_cross_entropy_with_logits(x[kept], (t[kept] > 0.5).double())
    same(L.binary_cross_entropy_with_logits(x, t, **options), expected)
    t = t.abs()
    expected = F.binary_cross_entropy_with_logits(x, (t > 0.5).double())
    same(L.binary_cross_entropy_with_logits(x, t, target_threshold=0.5), expected)


@pytest.mark.parametrize("of_indices", [False, True])
def test_compiled_whole(of_indices):
    x, t = (each.float() for each in data("certain"))
    t = torch.arange(20) % 7 if of_indices else t
    compiled = torch.compile(lambda x: L.asymmetric_loss(x, t), fullgraph=True)
    same(value_and_grads(compiled, x), value_and_grads(lambda x: L.asymmetric_loss(x, t), x), rtol=1e-5, atol=1e-6)
    if of_indices:
        logits = lambda x: L.binary_cross_entropy_with_logits(x, t, ignore_index=-100, label_smoothing=0.1)  # noqa: E731
        same(
            value_and_grads(torch.compile(logits, fullgraph=True), x), value_and_grads(logits, x), rtol=1e-5, atol=1e-6
        )
