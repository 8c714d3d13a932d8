"""TorchScript compiles every function and module, natively, and a saved one can be loaded."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import same
from losses import DTYPES, HALVES, REDUCTIONS
from marks import on_cpu_alone
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as L

# torch rounds each of its steps to a half type, where the kernels round once.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x, t = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5, dtype=torch.float64)
    index = torch.tensor([0, 4, -100, 2, 2, 1])
    given = {"x": x, "p": x.sigmoid(), "log": x.log_softmax(1), "t": t, "soft": t.softmax(1), "w": t[0] + 0.5}
    return {
        **{name: each.to(dtype) for name, each in given.items()},
        "y": index,
        "of_class": index.clamp(0),
        "background": index.clamp(-1) + 1,
        "signs": index % 2 * 2 - 1,
    }


# A function, its tensors by name, and what else is given.
CALLS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("binary_cross_entropy", ("p", "t"), {"weight": "w"}),
    ("binary_cross_entropy_with_logits", ("x", "t"), {"pos_weight": "w"}),
    ("cosine_embedding_loss", ("x", "t", "signs"), {"margin": 0.5}),
    ("cross_entropy", ("x", "y"), {"weight": "w", "label_smoothing": 0.1}),
    ("cross_entropy", ("x", "soft"), {}),
    ("focal_loss", ("x", "y"), {}),
    ("focal_loss", ("x", "y"), {"alpha": "w", "gamma": 0.0}),
    ("focal_loss", ("x", "of_class"), {"alpha": 0.3, "gamma": 1.5, "ignore_index": 2}),
    ("focal_loss", ("x", "soft"), {"alpha": "w"}),
    ("hinge_embedding_loss", ("x", "t"), {"margin": 0.5}),
    ("huber_loss", ("x", "t"), {"delta": 0.5}),
    ("kl_div", ("log", "soft"), {"log_target": True}),
    ("l1_loss", ("x", "t"), {}),
    ("margin_ranking_loss", ("x", "t", "p"), {"margin": 0.5}),
    ("mse_loss", ("x", "t"), {}),
    ("multi_margin_loss", ("x", "of_class"), {"weight": "w"}),
    ("multilabel_soft_margin_loss", ("x", "t"), {"weight": "w"}),
    ("nll_loss", ("log", "y"), {"weight": "w"}),
    ("poisson_nll_loss", ("x", "t"), {"full": True}),
    ("sigmoid_focal_loss", ("x", "t"), {}),
    ("sigmoid_focal_loss", ("x", "t"), {"alpha": -1.0, "gamma": 0.5, "weight": "w"}),
    ("sigmoid_focal_loss", ("x", "y"), {"weight": "w"}),
    ("sigmoid_focal_loss", ("x", "background"), {"ignore_index": 3}),
    ("smooth_l1_loss", ("x", "t"), {"beta": 0.5}),
    ("soft_margin_loss", ("x", "t"), {}),
    ("triplet_margin_loss", ("x", "t", "p"), {"swap": True}),
]
EACH = pytest.mark.parametrize(("function", "operands", "options"), CALLS, ids=str)


def test_every_function_is_here():
    scriptable = {name for name in L.__all__ if hasattr(getattr(L, name), "__prepare_scriptable__")}
    # TorchScript does not compile torch's own gaussian_nll_loss.
    assert {call[0] for call in CALLS} | {"log_probs", "gaussian_nll_loss"} == scriptable


def compared(
    run: Callable[..., Tensor], scripted: Callable[..., Tensor], x: Tensor, *rest: Any, **options: Any
) -> None:
    """Values and gradients."""
    results = []
    for each in (scripted, run):
        leaf = x.clone().requires_grad_()
        value = each(leaf, *rest, **options)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
    tolerance = CLOSE[x.dtype]
    same(results[0], results[1], rtol=tolerance, atol=tolerance)


@EACH
@on_cpu_alone("the scripted formulas are torch's operators on any device")
def test_a_function_gives_the_same(function, operands, options):
    scripted = torch.jit.script(getattr(L, function))
    for dtype in DTYPES:
        if function == "multi_margin_loss" and dtype in HALVES:  # torch's has no kernel for them on a CPU
            continue
        given = tensors(dtype)
        read = {name: given[value] if isinstance(value, str) else value for name, value in options.items()}
        for reduction in REDUCTIONS:
            x, *rest = (given[name] for name in operands)
            compared(getattr(L, function), scripted, x, *rest, **read, reduction=reduction)


def test_log_probs():
    for dtype in DTYPES:
        given = tensors(dtype)
        compared(
            L.log_probs, torch.jit.script(L.log_probs), given["x"], given["of_class"], temperature=0.5, ignore_index=2
        )


def reloaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


MODULES: list[tuple[Callable[[], nn.Module], str]] = [
    (fusedloss.FocalLoss, "y"),
    (lambda: fusedloss.FocalLoss([0.1, 0.2, 0.3, 0.4, 0.5], gamma=1, reduction="none"), "y"),
    (lambda: fusedloss.FocalLoss(1, reduction="sum"), "soft"),
    (fusedloss.SigmoidFocalLoss, "t"),
    (lambda: fusedloss.SigmoidFocalLoss(1, 2, weight=torch.rand(5), ignore_index=2), "y"),
]


@pytest.mark.parametrize(("make", "target"), MODULES)
def test_a_module_gives_the_same(make, target):
    module, given = make(), tensors()
    scripted = torch.jit.script(module)
    for each in (scripted, reloaded(scripted)):
        compared(module, each, given["x"], given[target])
    assert list(scripted.state_dict()) == list(module.state_dict())


def test_a_normalizer():
    module, given = fusedloss.SigmoidFocalLoss(), tensors()
    scripted = reloaded(torch.jit.script(module))
    for normalizer in (3.0, torch.tensor([3.0])):
        compared(module, scripted, given["x"], given["y"], normalizer)
    with pytest.raises(torch.jit.Error, match="normalizer needs reduction='mean'"):
        torch.jit.script(fusedloss.SigmoidFocalLoss(reduction="sum"))(given["x"], given["y"], 3.0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.criterion = nn.Linear(5, 5), fusedloss.FocalLoss()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.layer(x)
        return self.criterion(x, target) + L.mse_loss(x, 2 * x) + L.focal_loss(x, target, alpha=0.25)


def test_a_model_that_calls_functions_and_modules():
    model, given = Model(), tensors()
    compared(model, reloaded(torch.jit.script(model)), given["x"], given["y"])


def test_errors_are_raised():
    x, y = tensors()["x"], tensors()["y"]
    focal, sigmoid = torch.jit.script(L.focal_loss), torch.jit.script(L.sigmoid_focal_loss)
    for run, message in (
        (lambda: focal(x, y, gamma=-1.0), "gamma must be at least 0"),
        (lambda: focal(x, y, reduction="avg"), "not a valid value for reduction"),
        (lambda: focal(x, y, torch.ones(3)), "a weight for each class"),
        (lambda: sigmoid(x, y + 7), "a class index is above the number of classes"),
        (lambda: sigmoid(x, y[:3]), "targets must be of the inputs' size"),
        (lambda: torch.jit.script(L.log_probs)(x, y, temperature=0.0), "temperature must be positive"),
    ):
        with pytest.raises(torch.jit.Error, match=message):
            run()


EXTRAS: list[dict[str, Any]] = [
    {"z_loss": 0.1}, {"softcap": 5.0}, {"out_dtype": torch.float64}, {"all_ignored": "zero"}, {"return_lse": True},
]  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_what_torchs_cross_entropy_lacks_is_refused(extra):
    (name,) = extra
    with pytest.raises(RuntimeError, match=f"torch's CrossEntropyLoss, which knows no {name}"):
        torch.jit.script(fusedloss.CrossEntropyLoss(**extra))
    torch.jit.script(fusedloss.CrossEntropyLoss(grad_in_forward=True, inplace=True))  # hints change no result


def test_a_loss_of_ones_own_is_refused(monkeypatch):
    monkeypatch.setattr(fusedloss.custom, "library", lambda op, source, name: (None, "not compiled"))
    with pytest.raises(RuntimeError, match="fourth: TorchScript compiles no loss of your own"):
        torch.jit.script(fusedloss.pointwise_loss("fourth", "square(square(x - t))"))
