"""`z_loss`, `softcap`, `out_dtype`, `all_ignored` and `return_lse` of cross-entropy, alone and together."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import EPSILON, assert_close, class_dim, upstreams
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import Recorder, bytes_allocated, compiled_with_ops, holds
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

ALL = {"z_loss": 0.02, "softcap": 4.0, "out_dtype": torch.float32, "all_ignored": "zero", "return_lse": True}
OPTIONS = [{name: value} for name, value in ALL.items()] + [ALL]
HINTS: list[dict[str, Any]] = [
    {"grad_in_forward": True},
    {"inplace": True},
    {"grad_in_forward": True, "inplace": True},
]
# What a call is given beside logits; a kind of target, and what else torch has.
CALLS = {
    "index": {},
    "index, weight": {"weight": True},
    "index, smoothing": {"label_smoothing": 0.2},
    "index, weight and smoothing": {"weight": True, "label_smoothing": 0.2},
    "index, bytes": {"ignore_index": 3},
    "probabilities": {},
    "probabilities, weight and smoothing": {"weight": True, "label_smoothing": 0.2},
    "probabilities, float32": {},
}
# (2, 40000) goes by blocks of a row, (300, 10) by columns, and (4, 150, 3) has its classes apart. Two tests below have
# rows that are cut into parts.
SHAPES = [(6, 5), (4, 150, 3), (9,), (2, 40000), (300, 10)]


def call(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, target and torch's own arguments."""
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    x = (3 * normal(shape)).to(device, dtype)
    dim = class_dim(x)
    rows = shape[:dim] + shape[dim + 1 :]
    arguments = dict(CALLS[kind])
    if kind.startswith("probabilities"):
        wide = kind.endswith("float32") and dtype in HALVES
        target = (2 * normal(shape)).softmax(dim).to(device, torch.float32 if wide else dtype)
    else:
        ignored = arguments.get("ignore_index", -100)
        index = torch.randint(shape[dim], rows, generator=generator, device="cpu")
        if index.numel() > 4:
            index.view(-1)[1::4] = ignored
        target = (index.byte() if "bytes" in kind and shape[dim] < 256 else index).to(device)
    if arguments.get("weight"):
        arguments["weight"] = (normal((shape[dim],)).abs() + 0.1).to(device, dtype)
    return x, target, arguments


def formula(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    all_ignored: str = "nan",
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Loss and lse in plain float64: a sum over every class, of what it counts times lse - z."""
    x = x.double()
    dim, classes = class_dim(x), x.shape[class_dim(x)]
    z = x if softcap is None else torch.where(x == -math.inf, x, softcap * torch.tanh(x / softcap))
    lse = torch.logsumexp(z, dim)
    of_class = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    of_class = of_class.view(-1, *[1] * (x.dim() - 1 - dim)).expand_as(x)
    if target.is_floating_point():
        kept = torch.ones_like(lse)
        counted = of_class * (target.double() * (1 - label_smoothing) + label_smoothing / classes)
        divisor = torch.tensor(float(lse.numel()), dtype=torch.float64)
    else:
        kept = (target != ignore_index).double()
        index = (target.long() * kept.long()).unsqueeze(dim)
        own = torch.zeros_like(x).scatter(dim, index, 1.0)
        counted = of_class * (own * (1 - label_smoothing) + label_smoothing / classes) * kept.unsqueeze(dim)
        divisor = (of_class * own * kept.unsqueeze(dim)).sum()
    below = (lse.unsqueeze(dim) - z).masked_fill(counted == 0, 0.0)
    losses = (counted * below).sum(dim) + z_loss * kept * lse**2
    if reduction == "none":
        return losses, lse
    if reduction == "sum":
        return losses.sum(), lse
    nothing = all_ignored == "zero" and divisor == 0
    return losses.sum() * 0 if nothing else losses.sum() / divisor, lse


def results_and_grad(function: Callable[..., Any], x: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """Loss, lse where asked for, and the gradient of both; the logits are no leaf, so that they may be overwritten."""
    leaf = x.detach().clone().requires_grad_()
    results = function(leaf.clone(), *arguments, **options)
    results = list(results) if isinstance(results, tuple) else [results]
    if not options.get("return_lse"):
        results = results[:1]
    (grad,) = torch.autograd.grad(results, leaf, upstreams(*results))
    return [each.detach() for each in results] + [grad]


def ops_of(*arguments: Any, **options: Any) -> list[str]:
    with Recorder() as recorder:
        L.cross_entropy(*arguments, **options)
    return [op for op in recorder.seen if op != "aten.promote_types.default"]  # which is about dtypes alone


def name(options: dict[str, Any]) -> str:
    return " ".join(options)


@pytest.mark.thinned
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_against_float64(shape, kind, options, dtype, reduction):
    x, target, arguments = call(kind, shape, dtype)
    arguments["reduction"] = reduction
    *results, grad = results_and_grad(L.cross_entropy, x, target, **arguments, **options)
    *exact, exact_grad = results_and_grad(formula, x.double(), target, **arguments, **options)
    dtype_of_results = torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype
    dtype_of_results = options.get("out_dtype", dtype_of_results)
    assert grad.dtype == dtype and all(each.dtype == dtype_of_results for each in results)
    # One rounding in half types, to which that of ties adds; a sum of 40,000 terms in the others.
    for got, expected in zip([*results, grad], [*exact, exact_grad], strict=True):
        assert_close(got, expected, 1.02 if got.dtype in HALVES else 48)


@needs_extension
@pytest.mark.parametrize("options", [*OPTIONS, {}], ids=name)
@pytest.mark.parametrize("kind", CALLS)
def test_they_run_fused_and_nothing_else_runs(kind, options):
    op = "soft_cross_entropy" if kind.startswith("probabilities") else "cross_entropy"
    for dtype in DTYPES:
        x, target, arguments = call(kind, (6, 5), dtype)
        narrower = dtype == torch.float64 and "out_dtype" in options
        in_forward = x.device.type == "cpu" and dtype != torch.float16 and not options.get("return_lse")
        narrowed = ["aten._to_copy.default"] * narrower * (2 if options.get("return_lse") else 1)
        for requires_grad in (False, True):
            suffix = ".default" if options.get("return_lse") else ".without_second"
            suffix = "_with_grad.default" if requires_grad and in_forward else suffix
            expected = [f"fusedloss.{op}{suffix}", *narrowed]
            assert ops_of(x.requires_grad_(requires_grad), target, **arguments, **options) == expected


@pytest.mark.parametrize("options", [*OPTIONS, {}], ids=name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_with_a_gradient_run_natively(reduction, options):
    for dtype in DTYPES:
        x, target, arguments = call("probabilities, weight and smoothing", (6, 5, 2), dtype)
        target.requires_grad_()
        x.requires_grad_()
        assert not any("fusedloss" in op for op in ops_of(x, target, **arguments, **options))
        results = L.cross_entropy(x, target, **arguments, reduction=reduction, **options)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(results, (x, target), upstreams(*results))
        double_x, double_target = x.detach().double().requires_grad_(), target.detach().double().requires_grad_()
        exact = formula(double_x, double_target, **arguments, reduction=reduction, **options)[: len(results)]
        exact_grads = torch.autograd.grad(exact, (double_x, double_target), upstreams(*exact))
        for got, expected in zip([*results, *grads], [*exact, *exact_grads], strict=True):
            # torch rounds the log-probabilities to half types before it adds them up.
            assert_close(got.detach(), expected.detach(), 16 if dtype in HALVES else 48)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_of_probabilities_is_torchs(reduction):
    x, target, _ = call("probabilities", (6, 5, 2), torch.float32)
    target.requires_grad_()
    grads = []
    for function in (L.cross_entropy, F.cross_entropy):
        loss = function(x, target, reduction=reduction, label_smoothing=0.1)
        grads.append(torch.autograd.grad(loss, target, upstreams(loss))[0])
    assert torch.equal(*grads)


def test_a_weight_with_a_gradient_runs_natively():
    x, target, arguments = call("probabilities, weight and smoothing", (6, 5), torch.float64)
    weight = arguments["weight"].requires_grad_()
    assert not any("fusedloss" in op for op in ops_of(x, target, weight, **ALL))
    assert gradcheck(lambda weight: L.cross_entropy(x, target, weight, z_loss=0.1, softcap=3.0), weight)
    index = target.argmax(1)
    errors = []
    for function in (L.cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'") as caught:
            function(x.clone().requires_grad_(), index, weight)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_probabilities_wider_than_the_logits_give_their_dtype_on_either_route():
    x, target, _ = call("probabilities, float32", (6, 5), torch.bfloat16)
    assert F.cross_entropy(x, target).dtype == torch.float32
    for options in ({}, {"z_loss": 0.1}, {"softcap": 3.0}):
        for each in (target, target.clone().requires_grad_()):
            assert L.cross_entropy(x, each, **options).dtype == torch.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_gradcheck_and_gradgradcheck(kind, reduction):
    x, target, arguments = call(kind, (5, 4), torch.float64)
    x.requires_grad_()
    options = {**ALL, "out_dtype": None, "reduction": reduction, **arguments}
    assert gradcheck(lambda x: L.cross_entropy(x, target, **options), x)
    assert gradgradcheck(lambda x: L.cross_entropy(x, target, **options), x)


def test_either_result_alone_has_its_gradient():
    x, target, arguments = call("index, weight and smoothing", (40, 30), torch.float64)
    exact_x = x.clone().requires_grad_()
    x.requires_grad_()
    results = L.cross_entropy(x, target, **arguments, z_loss=0.1, return_lse=True)
    for got, exact in zip(results, formula(exact_x, target, **arguments, z_loss=0.1), strict=True):
        (grad,) = torch.autograd.grad(got, x, upstreams(got), retain_graph=True)
        (expected,) = torch.autograd.grad(exact, exact_x, upstreams(exact), retain_graph=True)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"softcap": -1}, "softcap must be positive, got -1"),
        ({"softcap": math.nan}, "softcap must be positive, got nan"),
        ({"z_loss": -0.1}, "z_loss must be at least 0, got -0.1"),
        ({"z_loss": math.nan}, "z_loss must be at least 0, got nan"),
        ({"all_ignored": "none"}, 'all_ignored must be "nan" or "zero", got \'none\''),
        ({"out_dtype": torch.int64}, "out_dtype must be a floating point type, got torch.int64"),
        ({"out_dtype": torch.complex64}, "out_dtype must be a floating point type, got torch.complex64"),
        ({"z_loss": 0.1, "reduction": "average"}, "average is not a valid value for reduction"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_what_is_out_of_range_is_rejected(kind, options, message):
    x, target, _ = call(kind, (6, 5), torch.float32)
    with pytest.raises(ValueError, match=message):
        L.cross_entropy(x, target, **options)
    with pytest.raises(ValueError, match=message):
        fusedloss.CrossEntropyLoss(**options)(x, target)


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_an_infinite_softcap_is_none(kind):
    x, target, _ = call(kind, (6, 5), torch.float32)
    assert torch.equal(L.cross_entropy(x, target, softcap=math.inf), L.cross_entropy(x, target))


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (9, 200), (2, 7, 50), (2, 131_100)], ids=str)
@pytest.mark.parametrize("extra", [{}, {"z_loss": 0.1, "label_smoothing": 0.1}, {"grad_in_forward": True}], ids=str)
def test_a_mean_over_nothing(shape, dtype, extra):
    x, _, _ = call("index", shape, dtype)
    ignored = torch.full(shape[:1] + shape[2:], -100)
    weight = torch.rand(shape[1]).to(dtype)
    for w, target in ((None, ignored), (weight, ignored), (torch.zeros_like(weight), ignored.clamp_min(0))):
        leaf = x.clone().requires_grad_()
        loss = L.cross_entropy(leaf, target, w, all_ignored="zero", **extra)
        assert loss == 0 and (torch.autograd.grad(loss, leaf)[0] == 0).all()
        if target is ignored:
            assert L.cross_entropy(x, target, w, all_ignored="nan", **extra).isnan()
    for reduction in ("sum", "none"):
        values = [L.cross_entropy(x, ignored, reduction=reduction, all_ignored=each) for each in ("nan", "zero")]
        assert torch.equal(*values) and (values[0] == 0).all()


@pytest.mark.parametrize("kind", CALLS)
def test_all_ignored_changes_no_other_mean(kind):
    x, target, arguments = call(kind, (6, 5), torch.float32)
    for reduction in REDUCTIONS:
        arguments["reduction"] = reduction
        values = [L.cross_entropy(x, target, **arguments, all_ignored=each) for each in ("nan", "zero")]
        assert torch.equal(*values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_loss_of_half_logits_is_not_rounded(dtype):
    x, target, _ = call("index", (40, 300), dtype)
    exact = F.cross_entropy(x.double(), target)
    loss = L.cross_entropy(x, target, out_dtype=torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert loss != L.cross_entropy(x, target).float()
    assert torch.equal(L.cross_entropy(x, target, out_dtype=dtype), L.cross_entropy(x, target))


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("options", [{"out_dtype": torch.float32}, ALL], ids=name)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_loss_makes_no_float32_copy_of_the_logits(dtype, options, kind):
    x, target, _ = call(kind, (64, 8000), dtype)
    x.requires_grad_()

    def train() -> None:
        results = L.cross_entropy(x, target, **options)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad([each.sum() for each in results], x)

    assert 2 * x.numel() <= bytes_allocated(train) < 2 * x.numel() + 64 * 64  # the gradient, and numbers for each row


def test_a_result_may_be_wider_or_narrower_than_the_arithmetic():
    x, target, arguments = call("index, weight", (40, 30), torch.float32)
    exact_loss, exact_lse = formula(x, target, **arguments, z_loss=0.1)
    for dtype, rtol in ((torch.float64, 1e-14), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        loss, lse = L.cross_entropy(x, target, **arguments, z_loss=0.1, return_lse=True, out_dtype=dtype)
        assert loss.dtype == lse.dtype == dtype
        torch.testing.assert_close(loss.double(), exact_loss, rtol=rtol, atol=0)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=rtol, atol=1e-14)
        leaf = x.clone().requires_grad_()
        L.cross_entropy(leaf, target, **arguments, out_dtype=dtype).backward()
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (6, 300), (4, 150, 3), (2, 131_100)], ids=str)
def test_softcap_keeps_a_mask_a_mask(shape, dtype):
    x, target, _ = call("index", shape, dtype)
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[:, 1::2] = True
    x, target = x.masked_fill(masked, -math.inf), torch.where(target < 0, target, target // 2 * 2)
    options = {"softcap": 3.0, "z_loss": 0.01, "return_lse": True}
    loss, lse, grad = results_and_grad(L.cross_entropy, x, target, **options)
    unmasked = x[:, ::2].contiguous()
    expected = formula(unmasked, torch.where(target < 0, target, target // 2), softcap=3.0, z_loss=0.01)
    assert (grad[masked] == 0).all() and grad.isfinite().all()
    bound = 2 * EPSILON[dtype] if dtype in HALVES else 48 * EPSILON[dtype]
    torch.testing.assert_close(loss.double(), expected[0], rtol=bound, atol=0)
    torch.testing.assert_close(lse.double(), expected[1], rtol=bound, atol=bound)
    probabilities = torch.zeros_like(x).masked_fill(~masked, 2 / shape[1])
    *results, grad = results_and_grad(L.cross_entropy, x, probabilities, **options)
    assert (grad[masked] == 0).all() and all(each.isfinite().all() for each in (*results, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_is_odd_and_bounded(dtype):
    # One class against a logit of 0: z is what the loss gives back, from the smallest x to the largest.
    x = torch.tensor([1e-4, 1e-2, 0.5, 3.0, 20.0, 1000.0, 6e4]).to(dtype)
    for sign in (1, -1):
        rows = torch.stack([sign * x, torch.zeros_like(x)], 1).requires_grad_()
        losses = L.cross_entropy(rows, torch.zeros(len(x), dtype=torch.long), softcap=30.0, reduction="none")
        z = 30 * torch.tanh(sign * x.double() / 30)
        expected = F.softplus(-z)
        torch.testing.assert_close(losses.double(), expected, rtol=max(1e-5, 1.01 * EPSILON[dtype]), atol=1e-7)
        (grad,) = torch.autograd.grad(losses.sum(), rows)
        slope = -torch.sigmoid(-z) * (1 - torch.tanh(x.double() / 30) ** 2)
        torch.testing.assert_close(grad[:, 0].double(), slope, rtol=max(1e-5, 1.01 * EPSILON[dtype]), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:], ids=str)
def test_the_lse_of_ignored_rows(shape, dtype):
    x, target, _ = call("index", shape, dtype)
    target.view(-1)[-1] = -100
    ignored = target == -100
    x.requires_grad_()
    loss, lse = L.cross_entropy(x, target, z_loss=0.1, return_lse=True)
    (upstream,) = upstreams(lse)
    grads = torch.autograd.grad([loss, lse], x, [torch.zeros_like(loss), upstream])[0]
    exact_lse = x.detach().double().logsumexp(1)
    exact = x.detach().double().softmax(1) * upstream.double().unsqueeze(1)
    assert_close(lse[ignored].detach(), exact_lse[ignored], 1.02 if dtype in HALVES else 48)
    rows = ignored.unsqueeze(1).expand_as(x)
    assert_close(grads[rows], exact[rows], 1.02 if dtype in HALVES else 48)
    assert (torch.autograd.grad(L.cross_entropy(x, target, z_loss=0.1), x)[0][rows] == 0).all()


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hints", HINTS, ids=name)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_the_gradient_is_made_changes_no_result(shape, kind, options, hints, dtype):
    x, target, arguments = call(kind, shape, dtype)
    expected = results_and_grad(L.cross_entropy, x, target, **arguments, **options)
    got = results_and_grad(L.cross_entropy, x, target, **arguments, **options, **hints)
    # A gradient made in forward is rounded once more where it is multiplied by the upstream.
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other.double(), 4 if dtype in HALVES else 16)


@pytest.mark.parametrize("options", [*OPTIONS, {}], ids=name)
def test_the_module_is_torchs_with_more_to_it(options):
    x, target, _ = call("index", (6, 5), torch.float32)
    weight = torch.rand(5)
    module = fusedloss.CrossEntropyLoss(weight, label_smoothing=0.1, **options)
    native = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    assert repr(module) == repr(native)
    assert list(module.state_dict()) == list(native.state_dict()) == ["weight"]
    module.load_state_dict(native.state_dict())
    expected = L.cross_entropy(x, target, weight, label_smoothing=0.1, **options)
    for each in (module, pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(each(x, target), expected, rtol=0, atol=0)


def test_a_module_pickled_before_them_still_works():
    module = fusedloss.CrossEntropyLoss()
    for option in ALL:
        del module.__dict__[option]
    x, target, _ = call("index", (6, 5), torch.float32)
    torch.testing.assert_close(module(x, target), nn.CrossEntropyLoss()(x, target))


@needs_extension
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("kind", ["index, weight and smoothing", "probabilities, weight and smoothing"])
def test_compile_keeps_the_fused_op(kind, options):
    compiled, graphs = compiled_with_ops(L.cross_entropy)
    op = "soft_cross_entropy" if kind.startswith("probabilities") else "cross_entropy"
    for dtype in (torch.float32, torch.bfloat16):
        x, target, arguments = call(kind, (6, 5), dtype)
        weight = arguments.pop("weight")
        graphs.clear()
        got = results_and_grad(compiled, x, target, weight, **arguments, **options)
        assert holds(graphs, op) and holds(graphs, f"{op}_backward")
        assert not any("log_softmax" in each for each in graphs)
        expected = results_and_grad(L.cross_entropy, x, target, weight, **arguments, **options)
        torch.testing.assert_close(got, expected)
