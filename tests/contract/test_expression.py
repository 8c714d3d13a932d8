"""Expressions: what is read, refused, printed, differentiated, and computed by PyTorch and by C++."""

import ctypes
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compiler import COMPILER, CSRC, fingerprint
from torch import Tensor

from fusedloss.custom._derivative import derivative
from fusedloss.custom._expression import FUNCTIONS, evaluate, names, number, of_difference, parse
from fusedloss.custom._printing import cpp, text
from fusedloss.custom._stable import stable

LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "squared": ("0.5 * (x - t) * (x - t)", {}),
    "absolute": ("std::abs(x - t)", {}),
    "huber": ("abs(x - t) <= delta ? 0.5*(x-t)*(x-t) : delta * (abs(x - t) - 0.5 * delta)", {"delta": 0.7}),
    "pseudo_huber": ("delta*delta*(sqrt(1 + (x-t)*(x-t)/(delta*delta)) - 1)", {"delta": 1.3}),
    "log_cosh": ("log(cosh(x - t))", {}),
    "log_cosh_spelled_out": ("abs(x - t) + softplus(-2 * abs(x - t)) - log(2)", {}),
    "log_cosh_of_keras": ("x - t + softplus(-2.f * (x - t)) - std::log(2.)", {}),
    "pinball": ("max(q * (t - x), (q - 1) * (t - x))", {"q": 0.3}),
    "tukey": ("fabs(x-t) <= c ? c*c/6 * (1 - pow(1 - square((x-t)/c), 3)) : c*c/6", {"c": 2.0}),
    "charbonnier": ("sqrt(square(x - t) + eps * eps)", {"eps": 0.1}),
    "cauchy": ("0.5 * c * c * log1p(square((x - t) / c))", {"c": 0.8}),
    "geman_mcclure": ("2 * square(x - t) / (square(x - t) + 4)", {}),
    "welsch": ("1 - exp(-square(x - t) / (2 * s * s))", {"s": 1.5}),
    "bce": ("softplus(x) - x * t", {}),
    "bce_spelled_out": ("-t * log(1/(1 + exp(-x))) - (1 - t) * log(1 - 1/(1 + exp(-x)))", {}),
    "margin": ("log(1 + exp(-x * t))", {}),
    "swish": ("x / (1 + exp(-x)) - t", {}),
    "poisson": ("exp(x) - t * x + expm1(0.5 * x) * sinh(t)", {}),
    "kl": ("t * log(t / (0.1 + abs(x)))", {}),
    "wing": ("abs(x-t) < w ? w * log(1 + abs(x-t)/e) : abs(x-t) - (w - w * log(1 + w/e))", {"w": 1.0, "e": 0.5}),
    "power": ("pow(abs(x - t), p) + pow(t, -2) * pow(x, 3)", {"p": 1.5}),
    "clamped": ("clamp(x, -1, limit) * tanh(x - t) + min(x, 2 * t)", {"limit": 0.9}),
    "waves": ("sin(x) * cos(t) + atan(x * t) + cosh(0.3 * x) * sign(x - 1)", {}),
    "conditions": ("!(x < t) && x > 0 || t == 1 ? x * x : select(x != 2, sinh(x) / cosh(x), -x)", {}),
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


def points(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    x = 3 * torch.randn(1000, generator=generator, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(1000, generator=generator, dtype=torch.float64)
    return x.to(dtype), t.to(dtype)


def at(source: str, **values: float) -> float:
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return float(evaluate(parse(source), tensors))


@pytest.mark.parametrize(
    "source, value",
    [
        ("1/2", 0.5),
        ("1.f + .5e1 - 1e-1", 5.9),
        ("2 - 3 - 4", -5),
        ("2 - (3 - 4)", 3),
        ("12 / 2 * 3", 18),
        ("-x * -+x", 9),
        ("2 + 3 * x", 11),
        ("1 < 2 == 2 < 1 ? 1 : 0", None),
        ("x < 4 && x > 2 ? 1 : 0", 1),
        ("x > 4 || x < 2 && x == 3 ? 1 : 0", 0),
        ("!(x != 3) ? x >= 3 ? 5 : 6 : 7", 5),
        ("select(x <= 2, 1, std::pow(x, 2))", 9),
        ("std::fmax(1,\n fabs(-x)) + fmin(1, 2)", 4),
        ("clamp(x, 0, 1) + sign(-x)", 0),
    ],
)
def test_parse(source: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError):
            parse(source)
    else:
        assert at(source, x=3) == pytest.approx(value)
        assert parse(text(parse(source))) == parse(source)


@pytest.mark.parametrize(
    "source, message, column",
    [
        ("x - y", "unknown name 'y'; known are x, t, the parameters delta, c, and the functions abs, ", 4),
        ("std::x", "unknown name 'std::x'", 0),
        ("foo(x)", "unknown name 'foo'", 0),
        ("delta(x)", "delta is not a function", 0),
        ("abs", "expected '(', got the end", 3),
        ("1 + pow(x)", "pow takes 2 arguments, got 1", 4),
        ("abs(x, t)", "abs takes 1 argument, got 2", 0),
        ("abs()", "abs takes 1 argument, got 0", 0),
        ("abs(x t)", "expected ',' or ')', got 't'", 6),
        ("abs(x", "expected ',' or ')', got the end", 5),
        ("abs(x,)", "expected a number, a name or '(', got ')'", 6),
        ("", "expected a number, a name or '(', got the end", 0),
        ("x -", "expected a number, a name or '(', got the end", 3),
        ("(x", "expected ')', got the end", 2),
        ("x)", "expected an operator, got ')'", 1),
        ("2x", "expected an operator, got 'x'", 1),
        ("x ^ 2", "unexpected character '^' (a power is pow(u, v))", 2),
        ("x ** 2", "expected a number, a name or '(', got '*' (a power is pow(u, v))", 3),
        ("torch.abs(x)", "unexpected character '.' (functions are called by their names alone)", 5),
        ("x if x > 0 else t", "expected an operator, got 'if' (a choice is c ? a : b)", 2),
        ("x > 0 and t > 0 ? 1 : 2", "expected a number, got a condition (and, or, not are &&, ||, !)", 0),
        ("relu(x)", "unknown name 'relu'", 0),
        ("x = t", "unexpected character '='", 2),
        ("x < t ? 1", "expected ':', got the end", 9),
        ("1e999", "a number too large for float64", 0),
        ("x < t", "expected a number, got a condition", 0),
        ("x + (x < t)", "expected a number, got a condition", 4),
        ("(x < t) + x", "+ needs a number here", 0),
        ("x < t < 1", "< needs a number here", 0),
        ("abs(x < t)", "expected a number, got a condition", 4),
        ("-(x < t)", "expected a number, got a condition", 1),
        ("x ? 1 : 2", "expected a condition, got a number", 0),
        ("x < 1 ? x < 0 : 2", "expected a number, got a condition", 8),
        ("select(x, 1, 2)", "expected a condition, got a number", 7),
        ("x && x < t ? 1 : 2", "&& needs a condition here", 0),
        ("x < t || t ? 1 : 2", "expected a condition, got a number", 9),
        ("!x ? 1 : 2", "expected a condition, got a number", 1),
    ],
)
def test_errors_show_the_place(source: str, message: str, column: int) -> None:
    with pytest.raises(ValueError) as error:
        parse(source, ("delta", "c"))
    first, line, caret = str(error.value).split("\n")
    assert first.startswith(message)
    assert (line, caret) == (f"  {source}", f"  {' ' * column}^")


def test_an_expression_is_a_string() -> None:
    with pytest.raises(TypeError, match="an expression must be a string, got function"):
        parse(lambda x, t: x - t)  # type: ignore[arg-type]


def test_error_in_a_second_line() -> None:
    with pytest.raises(ValueError) as error:
        parse("x +\n  2 * y -\n t")
    assert str(error.value).split("\n")[1:] == ["    2 * y -", "        ^"]


def test_too_deep() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse("(" * 100_000 + "x" + ")" * 100_000)


@pytest.mark.parametrize("name", ["x", "t", "2a", "", "a b", "é", "abs", "fmax", "lambda", "weight", "self"])
def test_names_no_parameter_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="parameter"):
        parse("x", (name,))


@EVERY_LOSS
def test_text_reads_back(name: str) -> None:
    source, params = LOSSES[name]
    tree = parse(source, params)
    for printed in (tree, stable(tree), derivative(tree, "x"), derivative(tree, "t")):
        assert parse(text(printed), params) == printed


@pytest.mark.parametrize("op", FUNCTIONS)
def test_evaluate_is_torch(op: str) -> None:
    arity, expected = FUNCTIONS[op]
    x, t = points()
    args = {"select": "x < t, x, t", "clamp": "x, -t, t"}.get(op, "abs(x), t" if arity == 2 else "0.1 + abs(x)")
    tensors = {"select": (x < t, x, t), "clamp": (x, -t, t)}.get(op, (x.abs(), t) if arity == 2 else (0.1 + x.abs(),))
    torch.testing.assert_close(evaluate(parse(f"{op}({args})"), {"x": x, "t": t}), expected(*tensors), rtol=0, atol=0)


def test_evaluate_knows_shape_and_dtype() -> None:
    x, t = torch.zeros(3, 1), torch.zeros(4)
    for source in ("1", "delta * delta", "x < t ? 1 : 0", "1 / delta", "x"):
        got = evaluate(parse(source, ("delta",)), {"x": x, "t": t, "delta": 0.0})
        assert got.shape == (3, 4) and got.dtype == torch.float32
    assert evaluate(parse("1 / 0"), {"x": x}).isinf().all()
    assert evaluate(parse("x < 1 ? 0.1 : 0"), {"x": x.double()})[0, 0] == 0.1


@EVERY_LOSS
def test_stable_changes_no_value(name: str) -> None:
    source, params = LOSSES[name]
    x, t = points()
    values = {"x": x, "t": t, **params}
    tree = parse(source, params)
    torch.testing.assert_close(evaluate(stable(tree), values), evaluate(tree, values), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "source, rewritten",
    [
        ("log1p(exp(x))", "softplus(x)"),
        ("log(exp(x) + 1)", "softplus(x)"),
        ("1 / (exp(-x) + 1)", "sigmoid(x)"),
        ("1 / (1 + exp(t - x))", "sigmoid(x - t)"),
        ("exp(x) / (1 + exp(x))", "sigmoid(x)"),
        ("t / (1 + exp(x))", "t * sigmoid(-x)"),
        ("log(1 - sigmoid(x))", "-softplus(x)"),
        ("sinh(x) / cosh(x)", "tanh(x)"),
        ("log(cosh(abs(x)))", "log_cosh(x)"),
        ("t + softplus(-2*x) + 1 - log(2) + x", "log_cosh(x) + t + 1"),
        ("t + softplus(-2*x) - log(3) + x", "t + softplus(-2 * x) - 1.0986122886681098 + x"),
        ("pow(x, 0.5) + pow(t, 2)", "sqrt(x) + square(t)"),
        ("log(1 / 0)", "log(1 / 0)"),
    ],
)
def test_stable(source: str, rewritten: str) -> None:
    assert text(stable(parse(source))) == rewritten


def test_stable_does_not_overflow() -> None:
    x = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    for source in ("log(1 + exp(x))", "1 / (1 + exp(-x))", "log(cosh(x))", "exp(x) / (1 + exp(x))"):
        tree = stable(parse(source))
        assert evaluate(tree, {"x": x}).isfinite().all(), source
        assert evaluate(derivative(tree, "x"), {"x": x}).isfinite().all(), source


@EVERY_LOSS
@pytest.mark.parametrize("variable", ["x", "t", "parameter"])
def test_derivative_is_autograd(name: str, variable: str) -> None:
    source, params = LOSSES[name]
    if variable == "parameter" and not params:
        pytest.skip("no parameters")
    variable = next(iter(params)) if variable == "parameter" else variable
    x, t = points()
    values: dict[str, Tensor] = {"x": x, "t": t}
    values |= {key: torch.full_like(x, value) for key, value in params.items()}
    values[variable].requires_grad_()
    tree = parse(source, params)
    losses = evaluate(tree, values)
    expected = torch.autograd.grad(losses.sum(), values[variable])[0] if losses.requires_grad else torch.zeros_like(x)
    torch.testing.assert_close(evaluate(derivative(tree, variable), values), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "source", ["abs(x)", "max(x, -x)", "min(x, 2*x)", "max(0, x)", "clamp(x, 0, 1)", "sign(x)", "x <= 0 ? x : 2*x"]
)
def test_derivative_at_a_kink_is_torchs(source: str) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    tree = parse(source)
    (expected,) = torch.autograd.grad(evaluate(tree, {"x": x}).sum(), x)
    assert float(evaluate(derivative(tree, "x"), {"x": x.detach()})) == float(expected)


@pytest.mark.parametrize(
    "source, expected",
    [
        (LOSSES["huber"][0], "abs(x - t) <= delta ? x - t : delta * sign(x - t)"),
        (LOSSES["pseudo_huber"][0], "(x - t) / sqrt(1 + (x - t) * (x - t) / (delta * delta))"),
        ("log(cosh(x - t))", "tanh(x - t)"),
        ("tanh(x)", "1 / square(cosh(x))"),
        ("log(1 + exp(x)) - x * t", "sigmoid(x) - t"),
        ("square(x - t)", "2 * (x - t)"),
        ("pow(x - t, 4) / 4", "pow(x - t, 3)"),
        ("square(x - t) / (1 + square(x - t))", "2 * (x - t) / square(1 + square(x - t))"),
        ("t * log(t / x)", "-t / x"),
        ("select(x > 0, t * x, 3)", "x > 0 ? t : 0"),
        ("square(1 + x)", "2 * (1 + x)"),
        ("log1p((x - t)*(x - t) / (c*c))", "2 / (c * c) * (x - t) / (1 + (x - t) * (x - t) / (c * c))"),
        ("t", "0"),
        ("3 * sign(x)", "0"),
    ],
)
def test_derivative_is_short(source: str, expected: str) -> None:
    assert text(derivative(parse(source, ("delta", "c")), "x")) == expected


def test_derivative_refuses_what_has_none() -> None:
    for source in ("x / 0", "x / (t - t)"):
        with pytest.raises(ValueError, match="divides by a constant that is 0"):
            derivative(parse(source), "x")
    with pytest.raises(ValueError, match="too large"):
        derivative(parse("1e200 * x * 1e200"), "x")


def test_derivative_of_a_huge_power_is_quick() -> None:
    assert text(derivative(parse("pow(2, 1e300) * x"), "x")) == "pow(2, 1e+300)"


@EVERY_LOSS
def test_twice_differentiable(name: str) -> None:
    source, params = LOSSES[name]
    x, t = points()
    x.requires_grad_()
    tree = stable(parse(source, params))
    (first,) = torch.autograd.grad(evaluate(tree, {"x": x, "t": t, **params}).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    expected = evaluate(derivative(derivative(tree, "x"), "x"), {"x": x, "t": t, **params})
    torch.testing.assert_close(second, expected.detach(), rtol=1e-8, atol=1e-9)


def test_log_cosh_is_curved_at_0() -> None:
    x = torch.zeros((), dtype=torch.float64)
    curvature = torch.func.grad(torch.func.grad(lambda x: evaluate(stable(parse("log(cosh(x))")), {"x": x})))
    assert float(curvature(x)) == 1


def test_evaluate_transforms_and_compiles() -> None:
    x, t = points(torch.float32)
    tree = stable(parse(*LOSSES["wing"]))

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return evaluate(tree, {"x": x, "t": t, **LOSSES["wing"][1]})

    expected = evaluate(derivative(tree, "x"), {"x": x, "t": t, **LOSSES["wing"][1]})
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, t), expected)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), loss(x, t))


def test_of_difference_and_names() -> None:
    of = {name for name, (source, params) in LOSSES.items() if of_difference(parse(source, params))}
    assert {"huber", "pseudo_huber", "log_cosh", "pinball", "wing", "tukey"} <= of
    assert not of & {"bce", "margin", "swish", "poisson", "kl", "power", "clamped", "waves"}
    assert not of_difference(parse("x")) and not of_difference(parse("x - t - t")) and of_difference(parse("1"))
    assert names(parse("x < a ? 1 : abs(b)", ("a", "b", "c"))) == {"x", "a", "b"}


@pytest.mark.parametrize(
    "source, printed",
    [
        ("x < t && x > 0 ? 0.5 : 2", "select(bool(int(x < t) & int(x > T(0))), T(0.5), T(2))"),
        ("pow(x, 3) + pow(x, t) + pow(x, 2.5)", "integer_power<3>(x) + pow(x, t) + pow(x, T(2.5))"),
        ("x / (c * c) + c / 2", "x * (T(1) / (c * c)) + c / T(2)"),
        ("sigmoid(-x) * softplus(t - x)", "sigmoid_of_minus(x) * softplus_of_minus(x - t)"),
        ("x - -2 - (t - 1)", "x - T(-2) - (t - T(1))"),
    ],
)
def test_cpp(source: str, printed: str) -> None:
    assert cpp(parse(source, ("c",))) == printed


# The C++ functions, and the losses as functors, in a library of loops: for each name and type out[i] = f(a[i], b[i]).

FLAGS = "-std=c++20 -O2 -ftree-vectorize -fvect-cost-model=dynamic -fno-math-errno -fno-trapping-math"
C_TYPES = {torch.float32: "float", torch.float64: "double"}
ARGUMENTS = {1: "a", 2: "a, b", 3: "a, b, T(2)"}
SCALAR = ("sin", "cos", "atan")  # calls of the C library


def _source() -> tuple[str, dict[int, str]]:
    """With the lines of its loops."""
    functors, loops = ["#include <losses/functions.h>", "namespace fusedloss::baseline::functions {"], []
    calls = {op: f"functions::{op}({ARGUMENTS[arity]})" for op, (arity, _) in FUNCTIONS.items() if op != "select"}
    calls |= {f"{op}_of_minus": f"functions::{op}_of_minus(a)" for op in ("sigmoid", "softplus")}
    for name, (source, params) in LOSSES.items():
        tree = stable(parse(source, params))
        members = "".join(f"T {key} = T({value});" for key, value in params.items())
        body = "".join(
            f"FUSEDLOSS_HD T {what}([[maybe_unused]] T x, [[maybe_unused]] T t) const {{ return {cpp(of)}; }}"
            for what, of in (("value", tree), ("grad", derivative(tree, "x")))
        )
        functors.append(f"template <class T> struct {name}_loss {{ {members} {body} }};")
        for what in ("value", "grad"):
            calls[f"{name}_{what}"] = f"functions::{name}_loss<T>().{what}(a, b)"
    for name, call in calls.items():
        for type in C_TYPES.values():
            loops.append(
                f'extern "C" void {name}_{type}(const {type}* __restrict as, const {type}* __restrict bs,'
                f" {type}* __restrict out, long n) {{ using T = {type}; using namespace fusedloss::baseline;"
                f" for (long i = 0; i < n; ++i) {{ const T a = as[i]; [[maybe_unused]] const T b = bs[i];"
                f" out[i] = {call}; }} }}"
            )
    lines = [*functors, "}", *loops]
    return "\n".join(lines), {at + 1: line.split("(")[0].split()[-1] for at, line in enumerate(lines)}


class Library:
    def __init__(self, once: Callable[[str, Callable[[Path], None]], Path], flags: list[str]) -> None:
        source, self.lines = _source()
        strict = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}"]
        command = [*COMPILER.split(), *FLAGS.split(), *strict, *flags]

        def build(folder: Path) -> None:
            (folder / "functions.cpp").write_text(source)
            files = [str(folder / "functions.cpp"), "-o", str(folder / "functions.so")]
            done = subprocess.run([*command, *files], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (folder / "report.txt").write_text(done.stderr)

        folder = once(f"expressions-{fingerprint(source + ' '.join(command), CSRC)}", build)
        self.report = (folder / "report.txt").read_text()
        self.loops = ctypes.CDLL(str(folder / "functions.so"))

    def __call__(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        a, b, out = a.contiguous(), b.to(a.dtype).contiguous(), torch.empty_like(a)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, out)]
        getattr(self.loops, f"{name}_{C_TYPES[a.dtype]}")(*pointers, ctypes.c_long(a.numel()))
        return out


def _is_gcc() -> bool:
    macros = subprocess.run([COMPILER, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True).stdout
    return "__GNUC__" in macros and "__clang__" not in macros


@pytest.fixture(scope="module", params=["plain", "native"])
def library(request: pytest.FixtureRequest, once: Callable[[str, Callable[[Path], None]], Path]) -> Library:
    """For any machine, and for this one, whose fused multiply-add rounds otherwise."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    flags = [] if request.param == "plain" else ["-march=native"]
    if flags and _is_gcc():
        flags += ["-fopt-info-vec-optimized", "-fno-ipa-icf"]  # equal functions keep a loop each
    return Library(once, flags)


def magnitudes(dtype: torch.dtype) -> Tensor:
    """Of both signs, over the normal range and densely where functions change."""
    top = math.log10(torch.finfo(dtype).max)
    some = torch.logspace(-top + 1, top - 0.01, 6_001, dtype=torch.float64)
    dense = torch.cat([torch.logspace(-6, 3, 6_001, dtype=torch.float64), torch.linspace(0, 20, 6_001).double()])
    both = torch.cat([some, dense])
    return torch.cat([both, -both]).to(dtype)


def units(got: Tensor, expected: Tensor) -> Tensor:
    """The error in units of the last place; those of results below the normal range are of its lowest."""
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(expected.abs().clamp(info.smallest_normal, info.max).double())[1]
    unit = info.eps * torch.exp2(exponent.double() - 1)
    error = (got.double() - expected.double()).abs() / unit
    same = (got == expected.to(got.dtype)) | (got.isnan() & expected.isnan())
    # Which of the largest number and infinity it is, rounding decides.
    at_the_edge = (expected.abs() / info.max - 1).abs() < 1e-4
    # Where results are below the normal range 0 will do.
    lost = (expected.abs() < 2 * info.smallest_normal) & (got.abs() < 2 * info.smallest_normal)
    return torch.where(same | at_the_edge | lost, 0, error)


def exact(op: str, a: Tensor, b: Tensor) -> Tensor:
    """In float64, to its last digits."""
    a, b = a.double(), b.double()
    if op == "log_cosh":
        d = a.abs()
        small = torch.atanh(torch.tanh(d.clamp(max=1) / 2) ** 2) * 2
        return torch.where(d < 0.9, small, d + (torch.log1p(torch.exp(-2 * d)) - math.log(2)))
    if op == "softplus":
        return a.clamp(min=0) + torch.log1p(torch.exp(-a.abs()))
    if op == "sigmoid":
        return torch.where(a < 0, torch.exp(-a.abs()), 1) / (1 + torch.exp(-a.abs()))
    if op in ("sinh", "cosh"):
        half = torch.exp(a.abs() / 2)  # torch's own overflow before the result does
        return torch.where(a.abs() < 30, FUNCTIONS[op][1](a), (0.5 * half) * half * (a.sign() if op == "sinh" else 1))
    if op.endswith("_of_minus"):
        return exact(op.removesuffix("_of_minus"), -a, b)
    arity, formula = FUNCTIONS[op]
    return formula(*(a, b, torch.tensor(2.0, dtype=torch.float64))[:arity])


UNARY = [op for op, (arity, _) in FUNCTIONS.items() if arity == 1] + ["sigmoid_of_minus", "softplus_of_minus"]


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("dtype", C_TYPES, ids=C_TYPES.values())
def test_functions(library: Library, op: str, dtype: torch.dtype) -> None:
    a = magnitudes(dtype)
    if op in SCALAR:
        a = a[a.abs() < 1e6]
    expected = exact(op, a, a)
    error = units(library(op, a, a), expected).nan_to_num(math.inf)
    worst = int(error.argmax())
    bound = 8 if dtype == torch.float64 or op in ("log_cosh", "tanh") else 4
    assert error[worst] <= bound, (float(a[worst]), float(expected[worst]))


@pytest.mark.parametrize("op", [op for op, (arity, _) in FUNCTIONS.items() if op != "select"])
@pytest.mark.parametrize("dtype", C_TYPES, ids=C_TYPES.values())
def test_functions_of_special_values(library: Library, op: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1, -1, tiny, -tiny, 2, -2, 3, -3, 0.5, -0.5, 1e30, -1e30]
    values = torch.tensor(special, dtype=dtype)
    a, b = (side.flatten() for side in torch.meshgrid(values, values, indexing="ij"))
    got, expected = library(op, a, b), exact(op, a, b).to(dtype)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=2 * tiny)
    if op == "abs":
        assert not got.signbit().any()
    if op in ("sinh", "tanh"):
        assert torch.equal(got.signbit()[~a.isnan()], a.signbit()[~a.isnan()])


@pytest.mark.parametrize("dtype", C_TYPES, ids=C_TYPES.values())
def test_pow(library: Library, dtype: torch.dtype) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    a = torch.exp(28 * torch.rand(50_000, generator=generator, dtype=torch.float64) - 14).to(dtype)
    a[::2] = 0.5 + torch.rand(25_000, generator=generator, dtype=torch.float64).to(dtype)
    b = (12 * torch.rand(50_000, generator=generator, dtype=torch.float64) - 6).to(dtype)
    b[::2] *= 10  # e^(b log a) multiplies the error of a log
    b[:5000] = torch.tensor([0.5, 1.5, -1, 2, 3], dtype=dtype).repeat(1000)
    error = units(library("pow", a, b), exact("pow", a, b))
    assert error.max() <= (4 if dtype == torch.float32 else 8)
    whole = b.round()
    error = units(library("pow", -a, whole), exact("pow", -a, whole))
    assert error.max() <= (4 if dtype == torch.float32 else 8)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", C_TYPES, ids=C_TYPES.values())
def test_losses_in_cpp(library: Library, name: str, dtype: torch.dtype) -> None:
    source, params = LOSSES[name]
    x, t = points(dtype)
    values = {"x": x.double().requires_grad_(), "t": t.double(), **params}
    expected = evaluate(parse(source, params), values)
    grad = torch.autograd.grad(expected.sum(), values["x"])[0]
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for got, wanted in ((library(f"{name}_value", x, t), expected), (library(f"{name}_grad", x, t), grad)):
        torch.testing.assert_close(got.double(), wanted.detach(), rtol=tolerance, atol=tolerance)


def test_functions_become_vector_code(library: Library) -> None:
    if platform.machine() != "x86_64" or not library.report:
        pytest.skip("needs a report of GCC for x86-64")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    vector = {
        library.lines.get(int(line.split(":")[1]), "") for line in library.report.splitlines() if "loop vec" in line
    }
    # AVX2 converts no 64-bit integers, which the exponent in a logarithm of doubles is.
    types = list(C_TYPES.values()) if torch.backends.cpu.get_cpu_capability() == "AVX512" else ["float"]
    loops = {loop for loop in library.lines.values() if loop.endswith(tuple(f"_{type}" for type in types))}
    left = {loop for loop in loops - vector if loop.rsplit("_", 1)[0] not in SCALAR}
    assert left == {f"waves_{what}_{type}" for what in ("value", "grad") for type in types}


def test_numbers_print_as_they_are() -> None:
    for value in (0.1, 1e-300, -2.0, 123456789012.0, 1e300, 1 / 3):
        assert stable(parse(text(number(value)))) == number(value)
