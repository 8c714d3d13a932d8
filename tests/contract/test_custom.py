"""Losses of one's own: compiled from an expression, they keep every promise of the built-in ones."""

import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import value_and_grad
from losses import DTYPES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import Recorder, compiled_with_ops
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import cpp_extension

import fusedloss
from fusedloss import custom
from fusedloss._library import extension
from fusedloss.custom import _architectures, _build, _rows

COMPILER = cpp_extension.get_cxx_compiler().split()[0]
pytestmark = [
    needs_extension,
    on_cpu_alone("compiles for the CPU; on a GPU test_gpu.py runs a custom loss"),
    pytest.mark.skipif(
        shutil.which(COMPILER) is None, reason="no C++ compiler; test_expression.py covers the formulas natively"
    ),
    pytest.mark.filterwarnings("ignore:Input #0 requires gradient"),
]

HUBER = "abs(x - t) <= delta ? square(x - t) / 2 : delta * (abs(x - t) - delta / 2)"
PSEUDO_HUBER = "delta * delta * (sqrt(1 + square((x - t) / delta)) - 1)"
# name: (value, gradient or None, parameters); of logits and labels where the name says so.
EXPRESSIONS = {
    "pseudo_huber": (PSEUDO_HUBER, None, {"delta": 0.7}),
    "own_huber": (HUBER, "clamp(x - t, -delta, delta)", {"delta": 1.0}),
    "log_cosh": ("log(cosh(x - t))", None, {}),
    "poisson": ("exp(x) - t * x", None, {}),
    # Parameters with names that C++ has already.
    "of_logits": ("(1 - t) * softplus(x) + M_PI * result * t * softplus(-x)", None, {"M_PI": 4.0, "result": 0.5}),
}


@pytest.fixture(scope="module")
def losses() -> dict[str, custom.PointwiseLoss]:
    return {
        name: fusedloss.pointwise_loss(name, value, grad, params) for name, (value, grad, params) in EXPRESSIONS.items()
    }


def data(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator, device = torch.Generator("cpu").manual_seed(0), torch.get_default_device()
    x, t = (make(shape, generator=generator, dtype=torch.float64, device="cpu") for make in (torch.randn, torch.rand))
    return x.to(device, dtype), t.to(device, dtype)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradcheck_and_gradgradcheck(losses, name):
    loss = losses[name]
    x, t = (tensor.requires_grad_() for tensor in data(torch.float64, 3, 4))
    weight = torch.rand(4, dtype=torch.float64)
    for reduction in REDUCTIONS:
        assert gradcheck(lambda x, t: loss(x, t, reduction, weight), (x, t))  # noqa: B023
        assert gradgradcheck(lambda x, t: loss(x, t, reduction, weight), (x, t))  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values_are_those_of_the_formula(losses, name, dtype):
    loss = losses[name]
    for shape in [(), (1,), (77,), (3, 5001)]:
        x, t = data(dtype, *shape)
        assert fusedloss.explain(loss, x, t).startswith("fused: cpu")
        for reduction in REDUCTIONS:
            value, grad, upstream = value_and_grad(loss, x, t, reduction)
            exact, exact_grad, _ = value_and_grad(
                lambda x, t, r: loss._native(x, t, None, r, *loss.params.values()),
                x.double(), t.double(), reduction, upstream,
            )  # fmt: skip
            rounding = 1.01 * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 24 * torch.finfo(dtype).eps
            for got, expected in ((value, exact), (grad, exact_grad)):
                assert got.dtype == dtype
                scale = expected.abs().max().clamp_min(torch.finfo(dtype).tiny)
                assert (got.double() - expected).abs().max() <= rounding * scale


def test_the_own_huber_is_the_built_in_one(losses):
    x, t = data(torch.float32, 50, 40)
    for reduction in REDUCTIONS:
        got = value_and_grad(losses["own_huber"], x, t, reduction)
        expected = value_and_grad(lambda x, t, r: F.huber_loss(x, t, r), x, t, reduction)
        torch.testing.assert_close(got[:2], expected[:2])


def test_parameters_weights_and_shapes(losses):
    loss = losses["pseudo_huber"]
    x, t = data(torch.float64, 6, 5)
    expected = 4 * (torch.sqrt(1 + ((x - t) / 2) ** 2) - 1)
    torch.testing.assert_close(loss(x, t, "none", delta=2.0), expected)
    for weight in (torch.rand(6, 5), torch.rand(5), torch.rand(6, 1), torch.rand(())):
        torch.testing.assert_close(loss(x, t, "sum", weight.double(), delta=2.0), (expected * weight).sum())
        assert fusedloss.explain(loss, x, t, "sum", weight.double()).startswith("fused")
    with pytest.warns(UserWarning, match="Using a target size"):
        torch.testing.assert_close(loss(x, t[:1], "none", delta=2.0)[0], expected[0])
    delta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda delta: loss(x, t, delta=delta), delta)  # natively
    with pytest.raises(TypeError, match="pseudo_huber: unknown parameter gamma; its parameters: delta"):
        loss(x, t, gamma=1.0)
    with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
        loss(x, t, "avg")


def test_the_gradient_is_shown(losses):
    assert losses["pseudo_huber"].grad == "(x - t) / sqrt(1 + square((x - t) / delta))"
    assert losses["own_huber"].grad == "clamp(x - t, -delta, delta)"
    assert "d/dx = tanh(x - t)" in repr(losses["log_cosh"])


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_compiled_and_under_transforms(losses, name):
    loss = losses[name]
    x, t = data(torch.float64, 6, 5)
    compiled, graphs = compiled_with_ops(lambda x, t, r: loss(x, t, r))
    got, expected = value_and_grad(compiled, x, t, "mean"), value_and_grad(loss, x, t, "mean")
    torch.testing.assert_close(got[:2], expected[:2])
    assert any(f"fusedloss.custom_{name}" in target for target in graphs)
    rows = torch.func.vmap(torch.func.grad(lambda x, t: loss(x, t, "sum")))(x, t)
    torch.testing.assert_close(rows, value_and_grad(loss, x, t, "sum", torch.tensor(1.0))[1])


def test_one_pass_makes_value_and_gradient(losses):
    x, t = data(torch.float32, 40, 30)
    x.requires_grad_()
    with Recorder() as recorder:
        losses["log_cosh"](x, t).backward()
    assert [op.rsplit("_", 3)[-2:] for op in recorder.seen if "custom" in op] == [["with", "grad.default"]]


def test_autocast(losses):
    x, t = data(torch.bfloat16, 40, 30)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses["log_cosh"](x, t).dtype == torch.float32
        assert losses["log_cosh"]._native(x, t, None, "mean").dtype == torch.float32


def test_threads_do_not_change_a_bit(losses):
    x, t = data(torch.float32, 1_000_003)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(value_and_grad(losses["log_cosh"], x, t, "mean")[:2])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


def test_it_is_compiled_once(losses, monkeypatch):
    def compiles(*arguments, **options):
        raise AssertionError("compiled again")

    monkeypatch.setattr(cpp_extension, "load", compiles)
    again = fusedloss.pointwise_loss("pseudo_huber", PSEUDO_HUBER, params={"delta": 3.0})
    x, t = data(torch.float32, 9)
    assert fusedloss.explain(again, x, t).startswith("fused")
    torch.testing.assert_close(again(x, t), losses["pseudo_huber"](x, t, delta=3.0))
    with pytest.raises(AssertionError, match="compiled again"):
        fusedloss.pointwise_loss("pseudo_huber", PSEUDO_HUBER + " + 1", params={"delta": 3.0})


WRONG = {
    "unknown name 'y'": ("x - y", None, {}),
    "unknown name 'relu'": ("relu(x - t)", None, {}),
    "unknown name 'gamma'": ("x - t", "gamma", {"delta": 1.0}),
    "expected a number, a name or": ("x - ", None, {}),
    "sqrt takes 1 argument, got 2": ("sqrt(x, t)", None, {}),
    "cannot be named x": ("x - t", None, {"x": 1.0}),
    "expected at most 8 parameters, got 9": ("x - t", None, {f"p{i}": 1.0 for i in range(9)}),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_told_before_anything_is_compiled(text, monkeypatch):
    monkeypatch.setattr(cpp_extension, "load", None)
    value, grad, params = WRONG[text]
    with pytest.raises(ValueError, match=text):
        fusedloss.pointwise_loss("wrong", value, grad, params)


def test_a_name_is_an_identifier():
    with pytest.raises(ValueError, match="expected an identifier for the name of a loss, got 'my loss'"):
        fusedloss.pointwise_loss("my loss", "x - t")


def test_a_wrong_gradient_is_found_when_the_loss_is_made():
    with pytest.raises(ValueError, match=r"wrong: d/dx = x - t is .* where a difference of values gives"):
        fusedloss.pointwise_loss("wrong", "square(x - t)", grad="x - t")


def test_what_does_not_compile_gives_the_compilers_line(monkeypatch):
    functor = custom.functor
    monkeypatch.setattr(custom, "functor", lambda *given: functor(*given).replace("return ", "return undeclared + ", 1))
    with pytest.raises(RuntimeError) as raised:
        fusedloss.pointwise_loss("wrong", "x - t + 0.125")
    assert "wrong did not compile: " in str(raised.value) and "undeclared" in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_without_a_compiler_it_runs_natively(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="quartic runs natively: no C.. compiler"):
        loss = fusedloss.pointwise_loss("quartic", "square(square(x - t))")
    x, t = data(torch.float64, 6, 5)
    assert fusedloss.explain(loss, x, t) == "native: no C++ compiler" and not loss.fused
    torch.testing.assert_close(loss(x, t), ((x - t) ** 4).mean())
    assert gradcheck(lambda x: loss(x, t), x.requires_grad_())


def test_a_ninja_beside_the_interpreter_is_found(monkeypatch, tmp_path):
    beside = sysconfig.get_path("scripts")
    if shutil.which("ninja", path=beside) is None:
        pytest.skip("no ninja beside this interpreter; the next test has none at all")
    (tmp_path / COMPILER).symlink_to(shutil.which(COMPILER))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _build._why_not(COMPILER) == ""
    assert os.environ["PATH"] == f"{tmp_path}{os.pathsep}{beside}"


def test_without_ninja_or_a_cache_it_runs_natively(monkeypatch, tmp_path):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "ninja" else which(name, path=path))
    with pytest.warns(UserWarning, match="fifth runs natively: no ninja"):
        assert not fusedloss.pointwise_loss("fifth", "pow(abs(x - t), 5)").fused
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="sixth runs natively: torch's extension cache cannot be used"):
        assert not fusedloss.pointwise_loss("sixth", "pow(abs(x - t), 6)").fused


@pytest.mark.parametrize("params", [["d"], "d", 1.0])
def test_params_are_a_mapping(params):
    with pytest.raises(TypeError, match="wrong: params must map names to their defaults, got "):
        fusedloss.pointwise_loss("wrong", "x - t", params=params)


def test_without_the_extension_it_runs_natively():
    script = (
        "import torch, fusedloss\n"
        "loss = fusedloss.pointwise_loss('quartic', 'square(square(x - t))')\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "loss(x, torch.zeros(3)).backward()\n"
        "print(loss.fused, loss.why_native, x.grad.sum().item())\n"
    )
    environment = {**os.environ, "FUSEDLOSS_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "FUSEDLOSS_DISABLE=1", "4.0"], done.stderr


def test_another_process_finds_it_compiled(losses, tmp_path):
    script = (
        "import torch, fusedloss\n"
        f"loss = fusedloss.pointwise_loss('pseudo_huber', {PSEUDO_HUBER!r}, params={{'delta': 0.7}})\n"
        "print(loss.fused, loss(torch.ones(3), torch.zeros(3)).item())\n"
    )
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("custom_pseudo_huber_*/*.so")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    fused, value = done.stdout.split()
    assert fused == "True" and float(value) == pytest.approx(
        losses["pseudo_huber"](torch.ones(3), torch.zeros(3)).item()
    )
    assert before and before == {path: path.stat().st_mtime_ns for path in before}
    assert set(before) == set(folder.glob("custom_pseudo_huber_*/*.so"))


def test_the_slope_of_tanh_keeps_its_digits():
    """As 1 - tanh^2 it would have none left at 9."""
    loss = fusedloss.pointwise_loss("of_tanh", "t * tanh(x)")
    x = torch.linspace(-12, 12, 1001, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(x, torch.ones(1001), "sum"), x)
    torch.testing.assert_close(slope.double(), 1 / x.detach().double().cosh() ** 2, rtol=2e-6, atol=0)


def pretend(monkeypatch, built_for="8.0;9.0", nvcc="/cuda", listed=None, gpus=()):
    monkeypatch.setattr(_build, "extension", SimpleNamespace(cuda_architectures=built_for, cpu_isa=lambda: "baseline"))
    _build.extension.compile_flags = ""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", nvcc)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"built_for": "none", "listed": "9.0", "gpus": [(9, 0)]}, []),
        ({"nvcc": None, "listed": "9.0", "gpus": [(9, 0)]}, []),
        ({}, []),
        ({"listed": "native"}, []),
        ({"gpus": [(9, 0), (7, 5), (8, 0), (9, 0)]}, ["8.0", "9.0"]),
        ({"listed": "native", "gpus": [(12, 0)]}, ["12.0"]),
        ({"listed": "7.5 8.6;9.0a 10.0+PTX", "gpus": [(8, 0)]}, ["8.6", "9.0a", "10.0+PTX"]),
        ({"listed": "Turing;Ampere Hopper", "gpus": [(8, 0)]}, ["8.0", "8.6+PTX", "9.0+PTX"]),
    ],
    ids=["no kernels", "no nvcc", "no gpu", "native without a gpu", "of the gpus", "native", "as listed", "by name"],
)
def test_what_is_compiled_for_cuda(monkeypatch, machine, expected):
    """Without a GPU or a list torch would raise an IndexError; below 8.0 the kernels do not compile."""
    pretend(monkeypatch, **machine)
    assert _build._cuda_architectures() == expected


@pytest.mark.parametrize("name", _architectures.NAMED)
def test_a_name_stands_for_what_torch_makes_of_it(monkeypatch, name):
    def flags(architectures: str) -> list[str]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        return cpp_extension._get_cuda_arch_flags()

    assert flags(name) == flags(";".join(_architectures.NAMED[name]))


def test_options_of_nvcc():
    assert _build._for_architectures(["9.0a", "10.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_every_gpu_has_a_library_of_its_own(monkeypatch):
    class Compiled(Exception):
        pass

    def compiled(module, units, options, name):
        raise Compiled(module)

    monkeypatch.setattr(_build, "_compiled", compiled)
    modules = []
    for gpus in ([], [(8, 0)], [(9, 0)]):
        pretend(monkeypatch, gpus=gpus)
        with pytest.raises(Compiled) as module:
            _build.library("custom", "", "custom")
        modules.append(str(module.value))
    assert len(set(modules)) == 3


def test_a_model_with_one_can_be_pickled(losses):
    loss = pickle.loads(pickle.dumps(losses["pseudo_huber"]))
    x, t = data(torch.float32, 9)
    assert torch.equal(loss(x, t), losses["pseudo_huber"](x, t)) and fusedloss.explain(loss, x, t).startswith("fused")


def test_the_most_parameters_are_the_kernels():
    assert extension.most_params == custom.MOST_PARAMS == _rows.MOST_PARAMS + 1
