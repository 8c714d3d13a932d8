"""A loss is one call to `__torch_function__`: to modes, to subclasses of Tensor, and to torch.fx."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import needs_extension
from observe import compiled_with_ops
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fusedloss
import fusedloss.functional as L


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, t = torch.randn(6, 5), torch.rand(6, 5)
    return {
        "x": x,
        "p": x.sigmoid(),
        "t": t,
        "y": torch.randint(5, (6,)),
        "of_classes": torch.rand(5),
        "like_x": t + 1,
        "of_rows": t[:, 0],
        "head": t[:5] - 0.5,
    }


# The tensors by name, which may each be a subclass, and the other arguments.
CALLS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "asymmetric_loss": (("x", "t"), {"weight": "of_classes", "clip": 0.1}),
    "binary_cross_entropy": (("p", "t"), {"weight": "of_classes", "reduction": "sum"}),
    "binary_cross_entropy_with_logits": (("x", "t"), {"weight": "like_x", "pos_weight": "of_classes"}),
    "cosine_embedding_loss": (("x", "t", "of_rows"), {"margin": 0.3}),
    "cross_entropy": (
        ("x", "y"),
        {"weight": "of_classes", "sample_weight": "of_rows", "z_loss": 0.1, "softcap": 5.0, "return_lse": True},
    ),
    "focal_loss": (("x", "y"), {"alpha": "of_classes", "gamma": 1.5, "sample_weight": "of_rows"}),
    "gaussian_nll_loss": (("x", "t", "p"), {"full": True}),
    "hinge_embedding_loss": (("x", "t"), {"margin": 0.3}),
    "huber_loss": (("x", "t"), {"weight": "like_x", "delta": 0.3}),
    "kl_div": (("x", "t"), {"reduction": "batchmean"}),
    "kl_divergence": (("x", "t"), {"labels": "y", "ignore_index": 2, "weight": "of_rows", "return_lse": True}),
    "l1_loss": (("x", "t"), {"weight": "like_x"}),
    "linear_cross_entropy": (
        ("x", "head", "y"),
        {
            "linear_bias": "of_classes",
            "weight": "of_classes",
            "sample_weight": "of_rows",
            "shift": 1,
            "return_lse": True,
        },
    ),
    "linear_focal_loss": (("x", "head", "y"), {"alpha": "of_classes", "gamma": 1.0, "chunk_rows": 2}),
    "linear_kl_divergence": (
        ("x", "head", "t"),
        {"linear_bias": "of_classes", "labels": "y", "ignore_index": 2, "weight": "of_rows", "chunk_rows": 2},
    ),
    "linear_log_probs": (
        ("x", "head", "y"),
        {"linear_bias": "of_classes", "temperature": 2.0, "return_entropy": True},
    ),
    "log_probs": (("x", "y"), {"temperature": 2.0, "return_entropy": True}),
    "margin_ranking_loss": (("x", "t", "p"), {"margin": 0.3}),
    "mse_loss": (("x", "t"), {"weight": "like_x"}),
    "multi_margin_loss": (("x", "y"), {"weight": "of_classes", "p": 2}),
    "multilabel_soft_margin_loss": (("x", "t"), {"weight": "of_classes"}),
    "nll_loss": (("x", "y"), {"weight": "of_classes", "ignore_index": 2, "sample_weight": "of_rows"}),
    "poisson_nll_loss": (("x", "t"), {"full": True}),
    "sigmoid_focal_loss": (("x", "y"), {"weight": "of_classes", "reduction": "mean", "normalizer": torch.tensor(3.0)}),
    "smooth_l1_loss": (("x", "t"), {"beta": 0.3}),
    "soft_margin_loss": (("x", "t"), {"reduction": "sum"}),
    "triplet_margin_loss": (("x", "t", "p"), {"swap": True}),
}
EVERY_FUNCTION = pytest.mark.parametrize("name", CALLS)


def called(name: str, subclass: type[Tensor] | None = None, of: str = "") -> tuple[Any, tuple[Any, ...], dict]:
    """The function and its arguments; the tensor named ``of`` is of the subclass."""
    given = _tensors()
    if subclass is not None:
        given[of] = given[of].as_subclass(subclass)
    operands, options = CALLS[name]
    read = lambda value: given[value] if isinstance(value, str) and value in given else value  # noqa: E731
    return getattr(L, name), tuple(map(read, operands)), {key: read(value) for key, value in options.items()}


def parts(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


class Plain(torch.Tensor):
    """With the __torch_function__ that every subclass inherits."""


class Logged(torch.Tensor):
    """Notes the functions that it is given to."""

    seen: list[Callable[..., Any]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs)


class Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Callable[..., Any]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_every_function_is_here():
    assert set(CALLS) == set(L.__all__)


@EVERY_FUNCTION
def test_a_mode_sees_one_call(name):
    function, tensors, options = called(name)
    expected = function(*tensors, **options)
    with Mode() as mode:
        got = function(*tensors, **options)
    assert mode.seen == [function]
    torch.testing.assert_close(parts(got), parts(expected), rtol=0, atol=0)
    with torch.device(torch.get_default_device()):  # a mode too
        torch.testing.assert_close(parts(function(*tensors, **options)), parts(expected), rtol=0, atol=0)


@EVERY_FUNCTION
def test_a_subclass_sees_one_call_and_is_the_results(name):
    operands, others = CALLS[name]
    expected = parts(getattr(L, name)(*called(name)[1], **called(name)[2]))
    for of in (*operands, *(other for other in others.values() if other in ("of_classes", "of_rows", "like_x"))):
        function, tensors, options = called(name, Logged, of)
        Logged.seen.clear()
        results = parts(function(*tensors, **options))
        assert Logged.seen == [function], of
        for got, value in zip(results, expected, strict=True):
            assert type(got) is Logged
            torch.testing.assert_close(got.as_subclass(Tensor), value)
        function, tensors, options = called(name, Plain, of)
        assert {type(each) for each in parts(function(*tensors, **options))} == {Plain}


@needs_extension
def test_a_subclass_is_explained():
    for name in CALLS:
        function, tensors, options = called(name, Plain, CALLS[name][0][0])
        told = fusedloss.explain(function, *tensors, **options)
        assert told == "native: a subclass of torch.Tensor, or no tensor"


@EVERY_FUNCTION
def test_a_subclass_is_compiled(name):
    torch._dynamo.reset()
    function, tensors, options = called(name, Plain, CALLS[name][0][0])
    expected = parts(function(*tensors, **options))
    results = parts(
        torch.compile(lambda *given: function(*given, **options), backend="eager", fullgraph=True)(*tensors)
    )
    for got, value in zip(results, expected, strict=True):
        assert type(got) is Plain
        torch.testing.assert_close(got.as_subclass(Tensor), value.as_subclass(Tensor))


@needs_extension
def test_a_compiled_call_under_a_mode_is_fused():
    torch._dynamo.reset()
    function, tensors, options = called("cross_entropy")
    compiled, graphs = compiled_with_ops(lambda *given: function(*given, **options))
    with torch.device(tensors[0].device):
        compiled(*tensors)
    assert any("fusedloss.cross_entropy" in target for target in graphs)


class Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


def test_a_refusal_is_told_as_torch_tells_it():
    x, t = torch.ones(3), torch.ones(3)
    for module in (F, L):
        with pytest.raises(TypeError, match="no implementation found for '.*mse_loss' on types that implement"):
            module.mse_loss(x.as_subclass(Refuses), t)


class Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.layer, self.criterion = nn.Linear(5, 5), criterion

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.layer(x).sigmoid(), target)


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BCELoss": (fusedloss.BCELoss, "t"),
    "BCEWithLogitsLoss": (lambda: fusedloss.BCEWithLogitsLoss(pos_weight=torch.ones(5)), "t"),
    "CrossEntropyLoss": (lambda: fusedloss.CrossEntropyLoss(torch.ones(5), out_dtype=torch.float64), "y"),
    "DistillationLoss": (lambda: fusedloss.DistillationLoss(alpha=1.0), "t"),
    "FocalLoss": (lambda: fusedloss.FocalLoss(torch.ones(5)), "y"),
    "HuberLoss": (fusedloss.HuberLoss, "t"),
    "L1Loss": (fusedloss.L1Loss, "t"),
    "MSELoss": (fusedloss.MSELoss, "t"),
    "NLLLoss": (lambda: fusedloss.NLLLoss(torch.ones(5)), "y"),
    "SigmoidFocalLoss": (lambda: fusedloss.SigmoidFocalLoss(weight=torch.ones(5)), "y"),
    "SmoothL1Loss": (fusedloss.SmoothL1Loss, "t"),
}


@pytest.mark.parametrize("name", MODULES)
def test_torch_fx_holds_a_module_as_one_call(name):
    make, target = MODULES[name]
    model, given = Model(make()), _tensors()
    traced = torch.fx.symbolic_trace(model)
    losses = [node for node in traced.graph.nodes if getattr(node.target, "__name__", "") in L.__all__]
    assert [node.op for node in losses] == ["call_function"]
    assert losses[0].target is getattr(L, losses[0].target.__name__)
    for each in (traced, pickle.loads(pickle.dumps(traced))):
        got, expected = each(given["x"], given[target]), model(given["x"], given[target])
        assert torch.equal(got, expected)
        assert got.grad_fn.name() == expected.grad_fn.name()  # as fused as before


@EVERY_FUNCTION
def test_torch_fx_holds_a_function_as_one_call(name):
    function, tensors, options = called(name)
    traced = torch.fx.symbolic_trace(
        (lambda x, head, target: function(x, head, target, **options))
        if len(tensors) == 3
        else (lambda x, target: function(x, target, **options))
    )
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    torch.testing.assert_close(parts(traced(*tensors)), parts(function(*tensors, **options)), rtol=0, atol=0)
