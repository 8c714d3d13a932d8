"""Parameters: what is no number is named, what is one of another type counts, and class weights may come as a list."""

from fractions import Fraction

import numpy
import pytest
import torch
import torch.nn.functional as F
from compare import same, warned
from losses import HALVES
from marks import needs_extension
from torch import Tensor

import fusedloss
import fusedloss.functional as L

WRONG = {
    "str": "1",
    "complex": 1j,
    "list": [[1.0]],
    r"a tensor of torch.float32 and shape \(2,\)": torch.ones(2, device="cpu"),
    r"a tensor of torch.complex64 and shape \(\)": torch.ones((), dtype=torch.complex64, device="cpu"),
}
# Of torch's own losses torch names them.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("z_loss", "softcap"),
    "focal_loss": ("gamma",),
    "log_probs": ("temperature",),
    "sigmoid_focal_loss": ("alpha", "gamma"),
}
EACH = pytest.mark.parametrize(("function", "name"), [(f, name) for f, names in PARAMETERS.items() for name in names])
OF_TORCH = [("huber_loss", "delta"), ("smooth_l1_loss", "beta"), ("cross_entropy", "label_smoothing")]


def operands(function: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    return x, torch.randint(3, (4,)) if function in ("cross_entropy", "focal_loss", "log_probs") else torch.rand(4, 3)


@pytest.mark.parametrize("described", WRONG)
@EACH
def test_what_is_no_number_is_named(function, name, described):
    with pytest.raises(TypeError, match=rf"^{function}\(\): argument '{name}' must be float, not {described}$"):
        getattr(L, function)(*operands(function), **{name: WRONG[described]})


@EACH
def test_none_is_no_number(function, name):
    if name != "softcap":
        with pytest.raises(TypeError, match=f"argument '{name}' must be float, not NoneType"):
            getattr(L, function)(*operands(function), **{name: None})


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("focal_loss", ("input", "target")),
        ("sigmoid_focal_loss", ("inputs", "targets")),
        ("asymmetric_loss", ("input", "target")),
        ("kl_divergence", ("student_logits", "teacher")),
    ],
)
@pytest.mark.parametrize(("other", "described"), [(numpy.ones((4, 3)), "ndarray"), (None, "NoneType")])
def test_what_is_no_tensor_is_named(function, names, position, other, described):
    given: list[object] = [*operands(function)]
    given[position] = other
    with pytest.raises(
        TypeError, match=rf"^{function}\(\): argument '{names[position]}' must be Tensor, not {described}$"
    ):
        getattr(L, function)(*given)


def test_a_dtype_and_a_normalizer_of_another_kind_are_named():
    x, y = operands("cross_entropy")
    with pytest.raises(TypeError, match=r"^cross_entropy\(\): argument 'out_dtype' must be torch.dtype, not str$"):
        L.cross_entropy(x, y, out_dtype="float32")
    for normalizer in (0, -1.5):
        with pytest.raises(ValueError, match=f"^normalizer must be positive, got {normalizer}$"):
            L.sigmoid_focal_loss(x, y, reduction="mean", normalizer=normalizer)


@pytest.mark.parametrize("described", WRONG)
@pytest.mark.parametrize(("function", "name"), OF_TORCH)
def test_of_torchs_parameters_the_answer_is_torchs(function, name, described):
    got, expected = (
        warned(lambda: getattr(module, function)(*operands(function), **{name: WRONG[described]}))[0]  # noqa: B023
        for module in (L, F)
    )
    if isinstance(expected, Tensor):  # torch takes the real part of a complex tensor
        same(got, expected)
    else:
        assert got == expected


@EACH
def test_numbers_of_other_types_count(function, name):
    x, target = operands(function)
    run = lambda value: getattr(L, function)(x, target, **{name: value})  # noqa: E731
    expected = run(0.75)
    for value in (numpy.float32(0.75), numpy.float64(0.75), Fraction(3, 4), torch.tensor(0.75), torch.tensor([0.75])):
        torch.testing.assert_close(run(value), expected)
    learned = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, learned)  # natively


def test_a_normalizer_that_is_no_number_is_named():
    x, target = operands("sigmoid_focal_loss")
    for wrong, described in (("1", "str"), (1j, "complex"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"argument 'normalizer' must be float, not {described}"):
            L.sigmoid_focal_loss(x, target, reduction="mean", normalizer=wrong)


@pytest.mark.parametrize("make", [fusedloss.FocalLoss, fusedloss.SigmoidFocalLoss])
def test_modules_name_them_when_they_are_made(make):
    for name in ("alpha", "gamma"):
        for wrong, described in (("1", "str"), (1j, "complex")):
            message = rf"^{make.__name__}\(\): argument '{name}' must be float, not {described}$"
            with pytest.raises(TypeError, match=message):
                make(**{name: wrong})
    with pytest.raises(TypeError, match=r"^SigmoidFocalLoss\(\): argument 'alpha' must be float, not list$"):
        fusedloss.SigmoidFocalLoss(alpha=[0.1, 0.9])
    learned = torch.nn.Parameter(torch.tensor(2.0))
    assert dict(make(gamma=learned).named_parameters()) == {"gamma": learned}


@pytest.mark.parametrize("kind", [list, tuple])
def test_class_weights_of_a_focal_loss_may_be_a_list(kind):
    x, target = operands("focal_loss")
    alpha = kind((0.125, 0.25, 3))
    for dtype in (torch.float32, torch.float64, *HALVES):
        expected = L.focal_loss(x.to(dtype), target, torch.tensor(alpha, dtype=dtype))
        assert torch.equal(L.focal_loss(x.to(dtype), target, alpha), expected)
        module = fusedloss.FocalLoss(alpha)
        assert list(module.state_dict()) == ["alpha"] and module.alpha.dtype == torch.float32
        assert torch.equal(module.to(dtype)(x.to(dtype), target), expected)
    soft = x.softmax(1)
    torch.testing.assert_close(L.focal_loss(x, soft, alpha), L.focal_loss(x, soft, torch.tensor(alpha)))
    with pytest.raises(ValueError, match=r"alpha must hold a weight for each of 3 classes, got shape \(2,\)"):
        L.focal_loss(x, target, kind((1.0, 2.0)))
    for run in (fusedloss.FocalLoss, lambda alpha: L.focal_loss(x, target, alpha)):
        with pytest.raises(TypeError, match="argument 'alpha' must hold floats, got str"):
            run(kind(("a", "b", "c")))


@needs_extension
def test_class_weights_in_a_list_run_fused():
    x, target = operands("focal_loss")
    assert fusedloss.explain(L.focal_loss, x, target, [0.1, 0.3, 0.6]).startswith("fused")
    assert fusedloss.explain(fusedloss.FocalLoss([0.1, 0.3, 0.6]), x.float(), target).startswith("fused")
