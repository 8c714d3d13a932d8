"""The losses under test, in one table: each test runs over all of them, and over every loss declared since.

`pytest --device cuda` runs the tests on a GPU: tensors are made there unless a test says otherwise.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import nvcc
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
import fusedloss.functional as L
from fusedloss import _route
from fusedloss._library import extension

NATIVE = {name: loss.native for name, loss in _route.LOSSES.items()}


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
        """Of the losses of an input of a shape: its rows in the softmax family."""
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
        input = input.to(dtype).to(device)
        if self.family == "pointwise":
            target = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            return input, (target.round() if seed % 2 else target).to(dtype).to(device)
        classes = shape[1] if len(shape) > 1 else shape[0]
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        if self.soft:
            scores = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            return input, scores.softmax(min(len(shape) - 1, 1)).to(dtype).to(device)
        index = torch.randint(classes, rows, generator=generator, device="cpu")
        if index.numel() > 1:
            index.view(-1)[1::8] = -100
        return input, index.to(device)


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


def _softmax(op: str, *params: float) -> Loss:
    name = f"{op} {', '.join(map(str, params))}".strip()
    return _declared(name, op, params)


def _declared(name: str, op: str, params: tuple[float, ...]) -> Loss:
    declared = _route.LOSSES[op]
    middle = (-100,) if declared.family == "softmax" else ()
    call = lambda formula: lambda x, t, r: formula(x, t, None, r, *middle, *params)  # noqa: E731
    return Loss(name, declared.family, call(declared.routed), call(declared.native), op, params, *declared[4:])


LOSSES = [
    Loss(
        "cross_entropy",
        "softmax",
        lambda x, y, r: L.cross_entropy(x, y, reduction=r),
        lambda x, y, r: NATIVE["cross_entropy"](x, y, None, r, -100),
        "cross_entropy",
    ),
    _focal(0.0),
    _focal(0.5),
    _focal(2.0, alpha=0.25),
    _huber(1.0),
    _huber(0.3),
    _sigmoid_focal(0.0, alpha=-1.0),
    _sigmoid_focal(0.5),
    _sigmoid_focal(2.0),
    _sigmoid_focal(3.0, alpha=0.7),
    _softmax("soft_cross_entropy", 0.0, 0.0, 0.0),
    _softmax("nll"),
    _softmax("log_probs", 0.7, 0.0),
    _softmax("cross_entropy", 0.1, 0.0, 0.0),
    _softmax("cross_entropy", 0.1, 1e-2, 5.0),
    _softmax("soft_cross_entropy", 0.1, 1e-2, 5.0),
    _softmax("log_probs", 1.3, 1.0),
]


# A loss the table above does not name, with its default parameters: a new one is tested from its first day.
# Those over class indices have a file of their own: test_index_targets.py.
_NEW = [
    _declared(name, name, loss.params)
    for name, loss in _route.LOSSES.items()
    if name not in {loss.op for loss in LOSSES} and loss.family != "indexed"
]
LOSSES += _NEW
ONE_OF_EACH = [LOSSES[0], LOSSES[3], LOSSES[4], LOSSES[8], *LOSSES[10:14], *_NEW]
POINTWISE = [loss for loss in LOSSES if loss.family == "pointwise"]
SOFTMAX = [loss for loss in LOSSES if loss.family == "softmax"]
INDEXED = [loss for loss in SOFTMAX if not loss.soft]

REDUCTIONS = ["mean", "sum", "none"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

needs_extension = pytest.mark.skipif(
    extension is None, reason="no extension here; tests/test_fallback.py covers the native path"
)

ON_GPU = extension is not None and extension.cuda_architectures != "none" and torch.cuda.is_available()

# What `--device cuda` leaves out: by file or folder here, by the marker below where a single test differs.
OF_THE_CPU = {
    "cuda_on_cpu": "runs the CUDA kernels on the CPU; tests/test_gpu.py runs them on a GPU",
    "test_cpu.py": "about instruction sets and threads of the CPU",
    "test_demo.py": "the demo trains on the CPU",
    "test_mutants.py": "compiles mutants of the formulas for the CPU; the formulas are the same on a GPU",
    "test_nvcc.py": "reads the compiler's output, which needs no GPU",
}


def on_cpu_alone(reason: str) -> pytest.MarkDecorator:
    """For a test whose contract is another one on a GPU; the reason names what covers it there."""
    return pytest.mark.on_cpu_alone(reason=reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests make their tensors: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_cpu_alone(reason): left out with --device cuda")
    if torch.device(config.getoption("--device")).type != "cpu" and not ON_GPU:
        raise pytest.UsageError("--device cuda needs a GPU and an extension built with its CUDA kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.device(config.getoption("--device")).type == "cpu":
        return
    for item in items:
        reasons = [OF_THE_CPU[part] for part in item.path.parts if part in OF_THE_CPU]
        reasons += [mark.kwargs["reason"] for mark in item.iter_markers("on_cpu_alone")]
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


KERNELS_BY_NVCC = pytest.StashKey[nvcc.Compilation]()


def pytest_runtestloop(session: pytest.Session) -> None:
    """What test_nvcc.py reads is compiled in the time that other tests leave: five minutes of one core."""
    config = session.config
    if session.testsfailed or config.option.collectonly or torch.device(config.getoption("--device")).type != "cpu":
        return
    if any("nvcc_runs" in getattr(item, "fixturenames", ()) for item in session.items) and shutil.which("nvcc"):
        config.stash[KERNELS_BY_NVCC] = nvcc.Compilation(nvcc.SOURCES, nvcc.ARCHITECTURES, nice=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    if KERNELS_BY_NVCC in config.stash:
        config.stash[KERNELS_BY_NVCC].end()


@pytest.fixture(scope="session", autouse=True)
def _extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Losses of one's own are compiled here, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests, not for doctests, whose text names no device."""
    device = request.config.getoption("--device")
    if device == "cpu" or isinstance(request.node, pytest.DoctestItem):
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def named(losses: list[Loss]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses, ids=[loss.name for loss in losses])


def runs_fused(loss: Loss, input: Tensor, target: Tensor, reduction: str = "mean") -> bool:
    """Whether the kernels own the call: a routed call that the formula never sees."""
    weightless = (input, target, None, reduction)
    middle = (-100,) if loss.family == "softmax" else ()
    return extension is not None and getattr(extension, loss.op)(*weightless, *middle, *loss.params) is not None


class Recorder(TorchDispatchMode):
    """Writes down the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def value_and_grad(
    function: Callable[..., Tensor], input: Tensor, target: Tensor, reduction: str, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and the upstream gradient used: random, never ones."""
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(x, target, reduction)
    if upstream is None:
        generator = torch.Generator("cpu").manual_seed(7)
        upstream = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    upstream = upstream.to(value.device, value.dtype)
    (grad,) = torch.autograd.grad(value, x, upstream)
    return value.detach(), grad, upstream


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, fusedloss=fusedloss)
