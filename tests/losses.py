"""The losses under test, in one table: each test runs over all of them, and over every loss declared since.

Whatever the tests ask the extension by a loss's name, they ask through the functions at the end of this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss.functional as L
from fusedloss import _route
from fusedloss._library import extension

NATIVE = {name: loss.native for name, loss in _route.LOSSES.items()}
REDUCTIONS = ["mean", "sum", "none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
OF_THREE = ("margin_ranking", "gaussian_nll")  # operands; tests that give no third one run them with ones


@dataclass(frozen=True)
class Loss:
    """A loss with its parameters fixed: the routed function and its native formula, called alike."""

    name: str
    family: str
    fused: Callable[..., Tensor]  # (input, target, reduction)
    native: Callable[..., Tensor]
    op: str
    params: tuple[float, ...] = ()
    soft: bool = False  # targets are class probabilities
    of_probabilities: bool = False  # inputs are

    def losses_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the losses of an input: its rows in the softmax family."""
        return shape if self.family == "pointwise" else shape[:1] + shape[2:] if len(shape) > 1 else ()

    def data(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Logits or predictions of a shape, and a target that fits; an eighth of class targets is ignored.

        The same numbers on every device.
        """
        device = torch.get_default_device()
        generator = torch.Generator("cpu").manual_seed(seed)
        input = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if self.op == "nll":
            input = -input.abs()  # log-probabilities
        if self.of_probabilities:
            input = input.sigmoid()
        if self.op == "poisson_nll":
            input = input.clamp(max=8)  # e^12 is infinite in float16
        if self.op == "poisson_nll_rate":
            input = input.abs() + 0.1
        input = input.to(dtype).to(device)
        if self.family == "pointwise":
            target = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            target = target.round() if seed % 2 else target
            return input, _TARGETS.get(self.op, lambda t: t)(target).to(dtype).to(device)
        classes = shape[1] if len(shape) > 1 else shape[0]
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        if self.soft:
            scores = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return input, scores.softmax(min(len(shape) - 1, 1)).to(dtype).to(device)
        index = torch.randint(classes, rows, generator=generator, device="cpu")
        if index.numel() > 1:
            index.view(-1)[1::8] = -100
        return input, index.to(device)


# From numbers between 0 and 1, what else a pointwise loss takes: labels of 1 and -1, positive numbers, counts.
_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge_embedding": lambda t: 2 * t.round() - 1,
    "soft_margin": lambda t: 2 * t.round() - 1,
    "kl_div": lambda t: t / 2 + 0.25,
    "kl_div_log_target": lambda t: -3 * t,
    "poisson_nll": lambda t: 5 * t + 0.25,
    "poisson_nll_rate": lambda t: 5 * t + 0.25,
}


def _focal(gamma: float, alpha: float | None = None) -> Loss:
    factor = 1.0 if alpha is None else alpha
    return Loss(
        f"focal gamma={gamma} alpha={alpha}",
        "softmax",
        lambda x, y, r: L.focal_loss(x, y, alpha, gamma, reduction=r),
        lambda x, y, r: NATIVE["focal"](x, y, None, r, -100, factor, gamma),
        "focal",
        (factor, gamma),
    )


def _sigmoid_focal(gamma: float, alpha: float = 0.25) -> Loss:
    return Loss(
        f"sigmoid_focal gamma={gamma} alpha={alpha}",
        "pointwise",
        lambda x, t, r: L.sigmoid_focal_loss(x, t, alpha, gamma, r),
        lambda x, t, r: NATIVE["sigmoid_focal"](x, t, None, r, alpha, gamma),
        "sigmoid_focal",
        (alpha, gamma),
    )


def _huber(delta: float) -> Loss:
    return Loss(
        f"huber delta={delta}",
        "pointwise",
        lambda x, t, r: L.huber_loss(x, t, r, delta),
        lambda x, t, r: NATIVE["huber"](x, t, None, r, delta),
        "huber",
        (delta,),
    )


def _hinge_embedding(margin: float) -> Loss:
    return Loss(
        f"hinge_embedding margin={margin}",
        "pointwise",
        lambda x, t, r: L.hinge_embedding_loss(x, t, margin, reduction=r),
        lambda x, t, r: NATIVE["hinge_embedding"](x, t, None, r, margin),
        "hinge_embedding",
        (margin,),
    )


def _poisson_nll(full: bool) -> Loss:
    return Loss(
        f"poisson_nll full={full}",
        "pointwise",
        lambda x, t, r: L.poisson_nll_loss(x, t, full=full, reduction=r),
        lambda x, t, r: NATIVE["poisson_nll"](x, t, None, r, float(full)),
        "poisson_nll",
        (float(full),),
    )


def _poisson_nll_rate(full: bool, eps: float) -> Loss:
    return Loss(
        f"poisson_nll_rate full={full} eps={eps}",
        "pointwise",
        lambda x, t, r: L.poisson_nll_loss(x, t, False, full, eps=eps, reduction=r),
        lambda x, t, r: NATIVE["poisson_nll_rate"](x, t, None, r, eps, float(full)),
        "poisson_nll_rate",
        (eps, float(full)),
    )


def _softmax(op: str, *params: float) -> Loss:
    name = f"{op} {', '.join(map(str, params))}".strip()
    return _declared(name, op, params)


def _declared(name: str, op: str, params: tuple[float, ...]) -> Loss:
    declared = _route.LOSSES[op]
    middle = (-100,) if declared.family == "softmax" else ()
    call = lambda formula: lambda x, t, r: formula(x, t, None, r, *middle, *params)  # noqa: E731
    return Loss(name, declared.family, call(declared.routed), call(declared.native), op, params, *declared[4:6])


CROSS_ENTROPY = Loss(
    "cross_entropy",
    "softmax",
    lambda x, y, r: L.cross_entropy(x, y, reduction=r),
    lambda x, y, r: NATIVE["cross_entropy"](x, y, None, r, -100),
    "cross_entropy",
)
LOSSES = [
    CROSS_ENTROPY,
    _focal(0.0),
    _focal(0.5),
    _focal(2.0, alpha=0.25),
    _huber(1.0),
    _huber(0.3),
    _sigmoid_focal(0.0, alpha=-1.0),
    _sigmoid_focal(0.5),
    _sigmoid_focal(2.0),
    _sigmoid_focal(3.0, alpha=0.7),
    _hinge_embedding(0.7),
    _poisson_nll(False),
    _poisson_nll(True),
    _poisson_nll_rate(False, 1e-8),
    _poisson_nll_rate(True, 1e-3),
    _declared("kl_div_log_target", "kl_div_log_target", ()),
    _declared("margin_ranking 0.7", "margin_ranking", (0.7,)),
    _declared("gaussian_nll 0.3, 1.0", "gaussian_nll", (0.3, 1.0)),
    _declared("asymmetric 4.0, 1.0, 0.05", "asymmetric", (4.0, 1.0, 0.05)),
    _declared("asymmetric 2.0, 0.0, 0.0", "asymmetric", (2.0, 0.0, 0.0)),
    _declared("smoothed binary cross-entropy 0.05, 0.95", "smoothed_binary_cross_entropy", (0.05, 0.95)),
    _softmax("soft_cross_entropy", 0.0, 0.0, 0.0),
    _softmax("nll"),
    _softmax("log_probs", 0.7, 0.0),
    _softmax("cross_entropy", 0.1, 0.0, 0.0),
    _softmax("cross_entropy", 0.1, 1e-2, 5.0),
    _softmax("soft_cross_entropy", 0.1, 1e-2, 5.0),
    _softmax("log_probs", 1.3, 1.0),
]
_MAIN = [
    "cross_entropy",
    "focal gamma=2.0 alpha=0.25",
    "huber delta=1.0",
    "sigmoid_focal gamma=2.0 alpha=0.25",
    "hinge_embedding margin=0.7",
    "poisson_nll full=True",
    "margin_ranking 0.7",
    "gaussian_nll 0.3, 1.0",
    "asymmetric 4.0, 1.0, 0.05",
    "soft_cross_entropy 0.0, 0.0, 0.0",
    "nll",
    "log_probs 0.7, 0.0",
    "cross_entropy 0.1, 0.0, 0.0",
]

# A loss the table above does not name, with its default parameters: a new one is tested from its first day.
# Class indices as targets have a file of their own: contract/test_index_targets.py.
_NEW = [
    _declared(name, name, loss.params)
    for name, loss in _route.LOSSES.items()
    if name not in {loss.op for loss in LOSSES}
]
LOSSES += _NEW
_BY_NAME = {loss.name: loss for loss in LOSSES}


def loss_named(name: str) -> Loss:
    return _BY_NAME[name]


ONE_OF_EACH = [loss_named(name) for name in _MAIN] + _NEW
POINTWISE = [loss for loss in LOSSES if loss.family == "pointwise"]
SOFTMAX = [loss for loss in LOSSES if loss.family == "softmax"]
INDEXED = [loss for loss in SOFTMAX if not loss.soft]

# Without focus or weights the focal losses are the two cross-entropies, by formulas that keep the digits torch's lose.
FOCAL_WITHOUT_FOCUS = loss_named("focal gamma=0.0 alpha=None")
SIGMOID_FOCAL_WITHOUT_FOCUS = loss_named("sigmoid_focal gamma=0.0 alpha=-1.0")


def each_of(losses: list[Loss]) -> pytest.MarkDecorator:
    """Runs a test once for each loss, under the loss's name."""
    return pytest.mark.parametrize("loss", losses, ids=[loss.name for loss in losses])


# ---- what the extension says of a loss

# The device that the kernels for CUDA run on: a GPU, or in a process that was told so the executor's (executor_device).
GPU = "executor" if extension is not None and "executor" in extension.devices else "cuda"
ON_EXECUTOR = GPU == "executor"
ON_GPU = extension is not None and (
    ON_EXECUTOR or (extension.cuda_architectures != "none" and torch.cuda.is_available())
)


def kernel(op: str) -> Callable[..., Any]:
    """The eager call of the kernels, which returns None where they decline."""
    return extension.losses[op].run


def traits(op: str) -> Any:
    return extension.losses[op].traits


def number(op: str) -> int:
    """The place of a loss in the list of its family, by which the tests' own C++ drivers name it."""
    place: int = extension.losses[op].number
    return place


def runs_fused(loss: Loss, input: Tensor, target: Tensor, reduction: str = "mean") -> bool:
    """Whether the kernels own the call: a routed call that the formula never sees."""
    middle = (-100,) if loss.family == "softmax" else ()
    call = (input, target, None, reduction, *middle, *loss.params)
    return extension is not None and kernel(loss.op)(*call) is not None
