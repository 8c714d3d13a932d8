"""A user's own pointwise loss: an expression, compiled once into the kernels that the built-in losses run on."""

import ctypes
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _expression, _route
from ._dtypes import in_float, widened
from ._expression import Tree
from ._library import extension, why_native
from .losses._elementwise import reduced, warn_of_broadcasting

__all__ = ["PointwiseLoss", "pointwise_loss"]


class PointwiseLoss:
    """What :func:`pointwise_loss` returns: ``loss(input, target, reduction="mean", weight=None, **params)``.

    Attributes:
        name: as given.
        value, grad, grad_target: the expressions of the loss and its slopes by x and t, as compiled.
        params: the defaults of its parameters.
        fused: whether it was compiled; otherwise it runs natively, and ``why_native`` says why.
    """

    def __init__(self, name: str, trees: tuple[Tree, Tree, Tree], params: Mapping[str, float]) -> None:
        self.name = name
        self.value, self.grad, self.grad_target = map(_expression.text, trees)
        self.params = dict(params)
        self.why_native = ""
        self._tree = trees[0]
        self._routed: _route.Formula = self._native

    @property
    def fused(self) -> bool:
        return not self.why_native

    def __call__(
        self, input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None, **params: float
    ) -> Tensor:
        """The loss of an input and a target of one shape, or, with torch's warning, of shapes that broadcast.

        Args:
            input: x; float32, float64, bfloat16 or float16.
            target: t.
            reduction: ``"mean"`` (over all elements), ``"sum"`` or ``"none"``.
            weight: a factor that broadcasts to the input.
            params: parameters that differ from their defaults; a tensor is differentiated natively.
        """
        if reduction not in _route.REDUCTIONS:
            raise ValueError(f"{reduction} is not a valid value for reduction")
        if unknown := params.keys() - self.params.keys():
            known = ", ".join(self.params) or "none"
            raise TypeError(f"{self.name}: unknown parameter {min(unknown)}; its parameters: {known}")
        warn_of_broadcasting(input, target)
        return self._routed(input, target, weight, reduction, *{**self.params, **params}.values())

    def _native(self, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *params: float) -> Tensor:
        dtype = torch.promote_types(input.dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        x, t = in_float(input), in_float(target)
        losses = _expression.evaluate(self._tree, {"x": x, "t": t, **dict(zip(self.params, params, strict=True))})
        if weight is not None:
            losses = losses * weight
        return reduced(losses, reduction).to(losses.dtype if widened(input) else dtype)

    def _told_native(self, *arguments: Any) -> Tensor:
        _route.tell_native(self.why_native)
        return self._native(*arguments)

    def __reduce__(self) -> Any:
        return pointwise_loss, (self.name, self.value, self.grad, self.params)

    def __repr__(self) -> str:
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        return f"{self.name}(x, t{params}) = {self.value}\n  d/dx = {self.grad}\n  d/dt = {self.grad_target}"


_KNOWN: dict[str, PointwiseLoss] = {}


def pointwise_loss(
    name: str, value: str, grad: str | None = None, params: Mapping[str, float] | None = None
) -> PointwiseLoss:
    """Make a pointwise loss of one's own, which runs on the kernels of the built-in ones.

    The expressions are compiled once, by :func:`torch.utils.cpp_extension.load_inline`, for the CPU and, where there is
    nvcc with a GPU (or a ``TORCH_CUDA_ARCH_LIST``), for CUDA; the result is kept in torch's extension cache under a
    hash of its content. Where there is no compiler the loss runs natively, with a warning.

    Args:
        name: of the loss, an identifier.
        value: the loss of a prediction ``x`` and a target ``t`` in the syntax of C++: numbers (every one a real number:
            1/2 is 0.5), ``+ - * /``, comparisons, ``c ? a : b``, and the functions abs, sign, sqrt, square, exp,
            expm1, log, log1p, sinh, cosh, tanh, log_cosh, sigmoid, softplus, sin, cos, atan, pow, min, max and clamp.
        grad: its slope by x in the same language; left out, it is derived with SymPy. ``print(loss)`` shows it.
        params: the names of further numbers in the expressions, eight at most, with their defaults.

    Returns:
        A function of ``(input, target, reduction="mean", weight=None, **params)`` with derivatives of every order, to
        the input and to the target, that runs in float32, float64, bfloat16 and float16, under autocast, ``torch.func``
        and ``torch.compile``.

    Raises:
        ValueError: an unknown name or a mistake in an expression, before anything is compiled; a value or gradient that
            does not agree with finite differences of the value.

    >>> pseudo_huber = pointwise_loss(
    ...     "pseudo_huber", "delta * delta * (sqrt(1 + square((x - t) / delta)) - 1)", params={"delta": 1.0}
    ... )
    >>> pseudo_huber(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 0.0]), "none", delta=2.0)
    tensor([0.1231, 3.2111])
    >>> print(pointwise_loss("log_cosh", "log(cosh(x - t))"))
    log_cosh(x, t) = log_cosh(x - t)
      d/dx = tanh(x - t)
      d/dt = -tanh(x - t)
    """
    params = dict(params or {})
    if not name.isidentifier():
        raise ValueError(f"expected an identifier for the name of a loss, got {name!r}")
    if len(params) > _MOST_PARAMS:
        raise ValueError(f"expected at most {_MOST_PARAMS} parameters, got {len(params)}")
    trees = _trees(value, grad, params)
    source = _functor(trees, params)
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    op = f"custom_{name}_{digest}"
    if op not in _KNOWN:
        loss = PointwiseLoss(name, trees, params)
        library = _library(op, source, loss)
        if library is None:
            loss._routed = loss._told_native
        else:
            assert extension is not None
            extension.add_pointwise(op, library)
            loss._routed = _route.pointwise(op, listed=False)(loss._native)
        _check(loss)
        _KNOWN[op] = loss
    loss = _KNOWN[op]
    if loss.params == params:
        return loss
    # The same expressions with other defaults.
    other = PointwiseLoss(name, trees, params)
    other._routed, other.why_native = loss._routed, loss.why_native
    return other


_MOST_PARAMS = 8  # kMaxParams of csrc/kernels/common.h


def _trees(value: str, grad: str | None, params: Mapping[str, float]) -> tuple[Tree, Tree, Tree]:
    tree = _expression.stable(_expression.parse(value, params))
    if grad is None:
        by_input = _expression.derivative(tree, "x")
    else:
        by_input = _expression.stable(_expression.parse(grad, params))
    return tree, by_input, _expression.derivative(tree, "t")


def _functor(trees: tuple[Tree, Tree, Tree], params: Mapping[str, float]) -> str:
    value, grad, grad_target = map(_expression.cpp, trees)
    declared = f"T {', '.join(params)};" if params else ""
    set_ = ", ".join(f"{name}(T(given[{i}]))" for i, name in enumerate(params))
    of_difference = str(_expression.of_difference(trees[0])).lower()
    arguments = "([[maybe_unused]] T x, [[maybe_unused]] T t) const"
    return f"""
namespace fusedloss::FUSEDLOSS_ISA::functions {{

template <class T>
struct Expression {{
  static constexpr bool of_difference = {of_difference};
  static constexpr ResultDType result = ResultDType::Promoted;
  {declared}
  explicit FUSEDLOSS_HD Expression([[maybe_unused]] const double* given) {": " + set_ if set_ else ""} {{}}
  FUSEDLOSS_HD T value{arguments} {{ return {value}; }}
  FUSEDLOSS_HD T grad{arguments} {{ return {grad}; }}
  FUSEDLOSS_HD T grad_target{arguments} {{ return {grad_target}; }}
}};

}}
"""


_ON_CPU = """
{target}
#include "kernels/custom.h"
#include "losses/functions.h"
#include "cpu/pointwise.inl"
#include "cpu/one_hot.inl"
#include "cpu/pointwise_tiles.inl"
{functor}
namespace fusedloss {{
{cuda}
extern "C" __attribute__((visibility("default"))) const CustomPointwise* fusedloss_custom() {{
  using namespace FUSEDLOSS_ISA;
  static const CustomPointwise custom = {{kCustomVersion, pointwise_traits<functions::Expression<double>>(),
                                         pointwise<functions::Expression>, {entry}}};
  return &custom;
}}
}}
"""

_ON_CUDA = """
#include "cuda/pointwise.cuh"
#include "losses/functions.h"
{functor}
namespace fusedloss {{
int fusedloss_custom_cuda(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {{
  return FUSEDLOSS_ISA::run_pointwise<FUSEDLOSS_ISA::functions::Expression>(result, args, stream);
}}
}}
"""


def _sources() -> Path:
    """The C++ sources: beside this file in an installed package, a folder up in a checkout."""
    here = Path(__file__).parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


def _library(op: str, functor: str, loss: PointwiseLoss) -> int | None:
    """The address of the compiled loss; None, and why in the loss, where it cannot be compiled."""
    from torch.utils import cpp_extension

    if extension is None:
        loss.why_native = why_native
        return None
    if shutil.which(cpp_extension.get_cxx_compiler().split()[0]) is None:
        loss.why_native = "no C++ compiler"
        warnings.warn(f"{loss.name} runs natively: {loss.why_native}", stacklevel=3)
        return None
    isa = extension.cpu_isa()
    architectures = _cuda_architectures()
    target = "" if isa == "baseline" else f'#include "cpu/isa/target_{isa}.inl"'
    entry = "fusedloss_custom_cuda" if architectures else "nullptr"
    declared = f"int {entry}(PointwiseResult, const CudaPointwiseArgs&, CudaStream);" if architectures else ""
    source = _ON_CPU.format(target=target, functor=functor, cuda=declared, entry=entry)
    # Everything the result depends on: sources, flags, and the instruction set and GPUs of this machine.
    digest = hashlib.sha256(repr((source, extension.compile_flags, architectures)).encode())
    for path in sorted(_sources().rglob("*.*")):
        if path.suffix in (".h", ".inl", ".cuh"):
            digest.update(path.read_bytes())
    module = f"{op}_{digest.hexdigest()[:12]}"
    cuda_source = _ON_CUDA.format(functor=functor) if architectures else None
    library = _compiled(module, source, cuda_source, _for_architectures(architectures), loss.name)
    entry_point: Any = ctypes.CDLL(library).fusedloss_custom
    entry_point.restype = ctypes.c_void_p
    address: int = entry_point()
    return address


def _cuda_architectures() -> list[str]:
    """Those listed, or else of the GPUs here, as far as the kernels are written for them; none without nvcc."""
    from torch.utils import cpp_extension

    if extension.cuda_architectures == "none" or cpp_extension.CUDA_HOME is None:  # type: ignore[union-attr]
        return []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed or listed == ["native"]:
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        listed = [f"{major}.{minor}" for major, minor in sorted(gpus)]
    return [entry for entry in listed if re.match(r"([89]|\d\d)\.\d", entry)]


def _for_architectures(architectures: list[str]) -> list[str]:
    """The options for nvcc; an entry is a number as 9.0a, with +PTX for what comes after."""
    options = []
    for entry in architectures:
        number, _, ptx = entry.replace(".", "").partition("+")
        options += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in ["sm"] + ["compute"] * bool(ptx)]
    return options


def _compiled(module: str, source: str, cuda_source: str | None, cuda_options: list[str], name: str) -> str:
    from torch.utils import cpp_extension

    include = str(_sources())
    try:
        cpp_extension.load_inline(
            module,
            cpp_sources=[source],
            cuda_sources=[] if cuda_source is None else [cuda_source],
            extra_cflags=extension.compile_flags.split(),  # type: ignore[union-attr]
            extra_cuda_cflags=["-O3", *cuda_options],
            extra_include_paths=[include],
            with_cuda=cuda_source is not None,
            is_python_module=False,
            no_implicit_headers=True,
        )
    except RuntimeError as error:
        # The compiler's own first line, not a page of templates.
        found = re.search(r"^.*\berror: .*$", str(error), re.MULTILINE)
        raise RuntimeError(f"{name} did not compile: {found[0] if found else error}") from None
    folder = cpp_extension._get_build_directory(module, verbose=False)
    return str(Path(folder) / f"{module}{cpp_extension.LIB_EXT}")


def _check(loss: PointwiseLoss) -> None:
    """The compiled value against the native one, and the slopes against differences of it, in float64."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(scale: float, offset: float) -> Tensor:
        return scale * torch.rand(256, generator=generator, dtype=torch.float64, device="cpu") + offset

    for x, t in (
        (random(6, -3), random(6, -3)),
        (random(0.9, 0.05), random(0.9, 0.05)),
        (random(4, 0.1), random(1, 0)),
    ):
        x, t = x.requires_grad_(), t.requires_grad_()
        with torch.enable_grad():
            got = loss._routed(x, t, None, "none", *loss.params.values())
            slopes = torch.autograd.grad(got.sum(), (x, t), allow_unused=True)
        native: Callable[..., Tensor] = lambda x, t: loss._native(x, t, None, "none", *loss.params.values())  # noqa: E731
        with torch.no_grad():
            _compare(loss, "value", loss.value, got, native(x, t), x, t, 1e-9)
            step = 1e-6
            by_input = (native(x + step, t) - native(x - step, t)) / (2 * step)
            by_target = (native(x, t + step) - native(x, t - step)) / (2 * step)
            for what, expression, slope, expected in (
                ("d/dx", loss.grad, slopes[0], by_input),
                ("d/dt", loss.grad_target, slopes[1], by_target),
            ):
                slope = torch.zeros_like(x) if slope is None else slope
                _compare(loss, what, expression, slope, expected, x, t, 1e-4)


def _compare(
    loss: PointwiseLoss, what: str, expression: str, got: Tensor, expected: Tensor, x: Tensor, t: Tensor, bound: float
) -> None:
    off = (got - expected).abs() > bound * (1 + expected.abs())
    off &= got.isfinite() & expected.isfinite()
    # A kink between the two points of a difference may throw one of 256 off, not more.
    if off.sum() > 2:
        i = int(off.nonzero()[0])
        against = "PyTorch" if what == "value" else "a difference of values"
        raise ValueError(
            f"{loss.name}: {what} = {expression} is {got[i]:.6g} at x = {x[i]:.6g}, t = {t[i]:.6g}, "
            f"where {against} gives {expected[i]:.6g}"
        )
