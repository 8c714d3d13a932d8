"""Losses of rows of one's own: compiled from an expression, they keep every promise of the built-in ones."""

import copy
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import error, same, value_and_grad
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import Recorder, compiled_with_ops
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import cpp_extension

import fusedloss
from fusedloss import custom
from fusedloss.custom import _rows
from fusedloss.custom._expression import OF_ROW, parse
from fusedloss.custom._printing import text
from fusedloss.custom._stable_row import stable_in_row

COMPILER = cpp_extension.get_cxx_compiler().split()[0]
compiled_for_the_cpu = [
    needs_extension,
    on_cpu_alone("compiles for the CPU; on a GPU test_gpu.py runs a custom loss of rows"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler; the tests above cover the formulas"),
]


@dataclass(frozen=True)
class Own:
    """A loss, and the same in plain PyTorch: of the statistics of rows, in the dtype that they have."""

    name: str
    value: str
    plain: Callable[..., Tensor]
    params: dict[str, float] = field(default_factory=dict)
    smooths: bool = True

    def made(self) -> custom.SoftmaxLoss:
        return fusedloss.softmax_loss(self.name, self.value, params=self.params)

    def expected(
        self, x: Tensor, y: Tensor, reduction: str = "mean", weight: Tensor | None = None, ignore_index: int = -100,
        label_smoothing: float = 0.0, **params: float,
    ) -> Tensor:  # fmt: skip
        kept = y != ignore_index
        nll = F.cross_entropy(x, y, reduction="none", ignore_index=ignore_index)
        ce = F.cross_entropy(x, y, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing)
        of_class = torch.ones_like(nll) if weight is None else weight[torch.where(kept, y, 0)]
        lse = x.logsumexp(min(x.dim() - 1, 1))
        losses = self.plain(ce, nll, (-nll).exp(), lse, of_class, **{**self.params, **params})
        losses = torch.where(kept, losses, 0)
        return losses if reduction == "none" else losses.sum() / (kept.sum() if reduction == "mean" else 1)


# Those of docs/own-losses.md, by their names there, so that each is compiled once for both.
EVERYTHING = Own(
    "focal",
    "weight * pow(q, gamma) * ce + z * square(lse)",
    lambda ce, nll, p, lse, w, gamma, z: w * (1 - p) ** gamma * ce + z * lse**2,
    {"gamma": 2.0, "z": 1e-4},
)
GCE = Own("gce", "(1 - pow(p, k)) / k", lambda ce, nll, p, lse, w, k: w * (1 - p**k) / k, {"k": 0.7}, smooths=False)
POLY = Own(
    "poly1",
    "alpha * ce + epsilon * (1 - p)",
    lambda ce, nll, p, lse, w, alpha, epsilon: w * (alpha * ce + epsilon * (1 - p)),
    {"alpha": 1.0, "epsilon": 1.0},
)
EACH = [EVERYTHING, GCE, POLY]
each_loss = pytest.mark.parametrize("own", EACH, ids=lambda own: own.name)
SHAPES = [(7,), (6, 5), (40, 300), (3, 5, 4), (2, 30, 5, 7)]


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, class indices of which some are ignored, and weights of classes."""
    generator = torch.Generator("cpu").manual_seed(0)
    classes = shape[min(len(shape) - 1, 1)]
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=generator)
    if y.numel() > 1:
        y.view(-1)[2::5] = -100
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), y, weight.to(dtype)


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses run natively; no compiler may run. What was made before is made anew afterwards."""
    monkeypatch.setattr(_rows, "library", lambda op, source, name, units: (None, "not compiled"))
    monkeypatch.setattr(_rows, "PATHS", {})
    monkeypatch.setattr(_rows, "CHECKED", set())
    monkeypatch.setattr(_rows, "_MADE", {})


# ---- the expressions


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("1 - p", "q"),
        ("2 * (1 - q)", "2 * p"),
        ("p - 1", "-q"),
        ("-log(p)", "nll"),
        ("log1p(-p) + log1p(-q)", "log(q) - nll"),
        ("exp(-nll)", "p"),
        ("1 - exp(-nll)", "q"),
        ("exp(-ce)", "exp(-ce)"),
        ("(1 - pow(p, k)) / k", "-expm1(-(k * nll)) / k"),
        ("sqrt(p) - 1", "expm1(-0.5 * nll)"),
        ("pow(p, 2) + pow(q, k)", "square(p) + pow(q, k)"),
    ],
)
def test_what_would_lose_digits_is_rewritten(given: str, read: str) -> None:
    tree = stable_in_row(parse(given, ("k",), OF_ROW))
    assert text(tree) == read and stable_in_row(parse(read, ("k",), OF_ROW)) == tree


@pytest.mark.parametrize(
    ("value", "slope"),
    [
        ("ce + e * q", "1 + e * p"),
        ("(1 - pow(p, e)) / e", "exp(-(e * ce))"),
        ("pow(q, e) * ce", "e * ce * p * pow(q, e - 1) + pow(q, e)"),
        ("nll - ce + q", "p"),
        ("square(lse) + p", "-p"),
    ],
)
def test_the_slope_by_ce_goes_through_p_and_q(natively: None, value: str, slope: str) -> None:
    loss = fusedloss.softmax_loss("own", value, params={"e": 1.5})
    assert loss.grad == slope and f"d/dce = {slope}" in repr(loss)


WRONG: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "unknown name 'x'; known are ce, nll, p, q, lse, weight, and": ("x", None, {}),
    "an expression of ce, nll, p, q or lse, got 'weight'": ("weight", None, {}),
    "cannot be named q: ce, nll, p, q, lse and weight are what": ("ce", None, {"q": 1.0}),
    "cannot be named label_smoothing: that is an argument": ("ce", None, {"label_smoothing": 1.0}),
    "expected at most 7 parameters, got 8": ("ce", None, {f"a{i}": 1.0 for i in range(8)}),
    "wrong: d/dce = .* where a difference of values gives": ("ce + q", "1", {}),
    "nested too deeply": ("(" * 3000 + "ce" + ")" * 3000, None, {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_told_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.setattr(_rows, "library", None)
    value, grad, params = WRONG[message]
    with pytest.raises(ValueError, match=message):
        fusedloss.softmax_loss("wrong", value, grad, params)


def test_a_slope_of_ones_own_is_taken(natively: None) -> None:
    loss = fusedloss.softmax_loss("own", "ce + square(q)", "1 + 2 * q * p")
    assert loss.grad == "1 + 2 * q * p"


# ---- natively


@each_loss
def test_natively(natively: None, own: Own) -> None:
    loss = own.made()
    assert not loss.fused and fusedloss.explain(loss, *data((6, 5))[:2]) == "native: not compiled"
    for shape, reduction in zip(SHAPES, ["mean", "sum", "none", "none", "mean"], strict=True):
        x, y, weight = data(shape)
        for options in ({}, {"weight": weight}, *([{"label_smoothing": 0.2, "weight": weight}] if own.smooths else [])):
            got = value_and_grad(lambda x, y, r: loss(x, y, r, **options), x, y, reduction)  # noqa: B023
            expected = value_and_grad(lambda x, y, r: own.expected(x, y, r, **options), x, y, reduction)  # noqa: B023
            same(got[:2], expected[:2])
    x, y, weight = (each.requires_grad_() if each.is_floating_point() else each for each in data((4, 5)))
    assert gradgradcheck(lambda x, w: loss(x, y, "none", w), (x, weight))
    of_rows = torch.rand(4, dtype=torch.float64)
    expected = (own.expected(x, y, "none", weight) * of_rows).sum() / of_rows[y != -100].sum()
    same(loss(x, y, weight=weight, sample_weight=of_rows), expected)


def test_bad_calls(natively: None) -> None:
    loss, gce = EVERYTHING.made(), GCE.made()
    x, y, _ = data((6, 5))
    for raised, message, call in (
        (TypeError, "focal: unknown parameter k; its parameters: gamma, z", lambda: loss(x, y, k=1.0)),
        (TypeError, r"focal\(\): argument 'z' must be float, not str", lambda: loss(x, y, z="1")),
        (TypeError, r"argument 'label_smoothing' must be float, not str", lambda: loss(x, y, label_smoothing="1")),
        (ValueError, "label_smoothing must be between 0.0 and 1.0, got 1.5", lambda: loss(x, y, label_smoothing=1.5)),
        (ValueError, "gce: label_smoothing smooths ce, which .* does not name", lambda: gce(x, y, label_smoothing=0.1)),
        (ValueError, "avg is not a valid value for reduction", lambda: loss(x, y, "avg")),
        (IndexError, "Target 9 is out of bounds", lambda: loss(x, y.clone().fill_(9))),
        (TypeError, r"focal\(\): argument 'weight' must be Tensor, not list", lambda: loss(x, y, weight=[1.0] * 5)),
        (
            ValueError,
            r"weight must hold one of each of 5 classes, got shape \(7,\)",
            lambda: loss(x, y, weight=x.new_ones(7)),
        ),
        (TypeError, "expected class indices for targets, got a target of torch.float64", lambda: loss(x, x)),
        (ValueError, "sample_weight must be of the rows' shape", lambda: loss(x, y, sample_weight=torch.ones(3))),
        (RuntimeError, "TorchScript compiles no loss of your own", lambda: torch.jit.script(loss)),
    ):
        with pytest.raises(raised, match=message):
            call()


def test_several_ignored_indices_and_a_mask(natively: None) -> None:
    loss = EVERYTHING.made()
    x, y, _ = data((6, 5))
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    mask = (y == 0) | (y == 3)
    expected = EVERYTHING.expected(x, y.masked_fill(mask, -100))
    same(loss(x, y, ignore_index=[0, 3]), expected)
    same(loss(x, y, ignore_index=mask), expected)


class Model(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(x, y, gamma=2.0)


def test_it_is_a_module(natively: None) -> None:
    loss = EVERYTHING.made()
    x, y, _ = data((6, 5))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), _rows._made(*loss._definition)):
        assert repr(other) == repr(loss) and torch.equal(other(x, y), loss(x, y))
    traced = torch.fx.symbolic_trace(Model(loss))
    assert _rows._call in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x, y), loss(x, y, gamma=2.0))


# ---- compiled


class TestCompiled:
    pytestmark = compiled_for_the_cpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @each_loss
    def test_values_are_no_further_off_than_torchs(self, own: Own, dtype: torch.dtype) -> None:
        """Of rows as long as a block, of columns, and of confident rows."""
        loss = own.made()
        for shape, scale in ((shape, scale) for shape in SHAPES for scale in (1, 8)):
            x, y, weight = data(shape, dtype)
            x = x * scale
            for options in self.options(own, weight):
                assert fusedloss.explain(loss, x, y, **options).startswith("fused: cpu")
                for reduction in REDUCTIONS:
                    self.compare(own, loss, x, y, reduction, options)

    @staticmethod
    def options(own: Own, weight: Tensor) -> Iterator[dict[str, Any]]:
        yield {}
        yield {"weight": weight}
        if own.smooths:
            yield {"label_smoothing": 0.2, "weight": weight}

    @staticmethod
    def compare(own: Own, loss: Any, x: Tensor, y: Tensor, reduction: str, options: dict[str, Any]) -> None:
        *got, upstream = value_and_grad(lambda x, y, r: loss(x, y, r, **options), x, y, reduction)
        wide = {name: each.double() if isinstance(each, Tensor) else each for name, each in options.items()}
        smoothing = wide.get("label_smoothing", 0.0)

        def exactly(x: Tensor, y: Tensor, reduction: str) -> Tensor:
            """Natively, because 1 - p in float64 has lost 1e-16 of q."""
            value: Tensor = loss._native(x, y, wide.get("weight"), reduction, -100, smoothing, *loss.params.values())
            return value

        *exact, _ = value_and_grad(exactly, x.double(), y, reduction, upstream)
        *plain, _ = value_and_grad(lambda x, y, r: own.expected(x, y, r, **options), x, y, reduction, upstream)
        limits = torch.finfo(x.dtype)
        steps = 0.51 if x.dtype in HALVES else 16 + x.abs().max().item()  # e^-nll has the rounding of nll
        for one, other, torchs in zip(got, exact, plain, strict=True):
            assert one.dtype == x.dtype
            off, of_torch = ((each.double() - other).abs().max().nan_to_num(0) for each in (one, torchs))
            bound = steps * limits.eps * other.abs().max() + limits.tiny * limits.eps
            assert one.isfinite().all() and off <= max(bound, of_torch), (x.shape, reduction, list(options))

    @each_loss
    def test_gradcheck(self, own: Own) -> None:
        loss = own.made()
        x, y, weight = data((4, 5))
        x.requires_grad_()
        for reduction in REDUCTIONS:
            for options in self.options(own, weight):
                run = lambda x: loss(x, y, reduction, **options)  # noqa: E731, B023
                assert gradcheck(run, x) and gradgradcheck(run, x)

    def test_a_row_that_is_certain_has_a_finite_gradient(self) -> None:
        """Where q is 0 in float32, a slope of its power by its base is infinite."""
        loss = EVERYTHING.made()
        x = torch.tensor([[500.0, 0.0, 0.0], [0.0, 500.0, 0.0]], requires_grad=True)
        for gamma in (0.0, 0.5, 1.0, 2.0):
            (grad,) = torch.autograd.grad(loss(x, torch.tensor([0, 0]), "sum", gamma=gamma, z=0.0), x)
            same(grad, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]))
            native = loss._native(x, torch.tensor([0, 0]), None, "sum", -100, 0.0, gamma, 0.0)
            same(torch.autograd.grad(native, x)[0], grad)

    def test_long_rows_are_cut(self, threads: Callable[[int], None]) -> None:
        loss = EVERYTHING.made()
        x, y, weight = data((3, 150_000), torch.float32)
        results = []
        for number in (1, 2):
            threads(number)
            run = lambda x, y, r: loss(x, y, r, weight, label_smoothing=0.1)  # noqa: E731
            results.append(value_and_grad(run, x, y, "mean")[:2])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        run = lambda x, y, r: EVERYTHING.expected(x, y, r, weight.double(), label_smoothing=0.1)  # noqa: E731
        for got, exact in zip(results[0], value_and_grad(run, x.double(), y, "mean")[:2], strict=True):
            assert error(got, exact) < 1e-5

    def test_layouts_weights_of_rows_and_uint8(self) -> None:
        loss = EVERYTHING.made()
        x, y, weight = data((6, 40))
        of_rows = torch.rand(6, dtype=torch.float64)
        of_rows[1] = 0
        strided = torch.empty(40, 6, dtype=torch.float64).t().copy_(x)
        for logits in (x, strided, torch.cat([x, x], 1)[:, :40], x.repeat(2, 1)[::2][:6] * 0 + x):
            assert fusedloss.explain(loss, logits, y, sample_weight=of_rows).startswith("fused")
            expected = (EVERYTHING.expected(x, y, "none", weight) * of_rows).sum() / of_rows[y != -100].sum()
            same(loss(logits, y, "mean", weight, sample_weight=of_rows), expected)
        same(loss(x, y.clamp_min(0).byte(), ignore_index=0), EVERYTHING.expected(x, y.clamp_min(0), ignore_index=0))

    def test_compiled_exported_and_under_transforms(self) -> None:
        loss = EVERYTHING.made()
        x, y, weight = data((6, 40))
        run = lambda x, y, r: loss(x, y, r, weight, label_smoothing=0.1, gamma=2.0)  # noqa: E731
        for reduction in REDUCTIONS:
            compiled, graphs = compiled_with_ops(run)
            got, expected = value_and_grad(compiled, x, y, reduction), value_and_grad(run, x, y, reduction)
            same(got[:2], expected[:2])
            assert any("fusedloss.custom_focal" in target for target in graphs)
        exported = torch.export.export(Model(loss), (x, y)).module()
        same(exported(x, y), loss(x, y, gamma=2.0))
        each = torch.func.vmap(torch.func.grad(lambda x, y: loss(x, y, "sum")))(x, y.clamp_min(0))
        same(each, value_and_grad(lambda x, y, r: loss(x, y, r), x, y.clamp_min(0), "sum", torch.tensor(1.0))[1])

    def test_autocast_and_one_pass(self) -> None:
        loss = EVERYTHING.made()
        x, y, _ = data((6, 300), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert loss(x, y).dtype == torch.float32
            same(loss(x, y, "none"), loss(x.float(), y, "none"))
        x.requires_grad_()
        with Recorder() as recorder:
            loss(x, y, label_smoothing=0.1).backward()
        assert [op.rsplit("_", 3)[-2:] for op in recorder.seen if "custom" in op] == [["with", "grad.default"]]

    def test_a_bad_target_and_a_parameter_that_is_a_tensor(self) -> None:
        loss = EVERYTHING.made()
        x, y, _ = data((6, 40))
        with pytest.raises(IndexError, match="Target 40 is out of bounds"):
            loss(x, y.clone().fill_(40))
        gamma = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        assert fusedloss.explain(loss, x, y, gamma=gamma) == "native: a parameter that is no number"
        assert gradcheck(lambda gamma: loss(x, y, gamma=gamma), gamma)

    def test_two_losses_keep_their_own_numbers(self) -> None:
        """Their libraries have functions of the same names."""
        x, y, _ = data((6, 40))
        one, other = EVERYTHING.made()(x, y), GCE.made()(x, y)
        assert not math.isclose(one, other)
        same(one, EVERYTHING.expected(x, y))
        same(other, GCE.expected(x, y))
