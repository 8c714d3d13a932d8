"""Making a loss of one's own: what cannot work is told before a compiler runs, a failure leaves nothing behind, threads
get one loss, and the loss is a module."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import needs_extension, on_cpu_alone
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fusedloss
from fusedloss import custom

SQUARE, CUBE = "p * square(x - t)", "p * square(x - t) * abs(x - t)"


@pytest.fixture
def not_compiled(monkeypatch):
    """Losses run natively; no compiler may run."""
    monkeypatch.setattr(custom, "library", lambda op, source, name: (None, "not compiled"))


@pytest.fixture(scope="module")
def address() -> int:
    """Of SQUARE, compiled."""
    params = {"p": 2.0}
    found, why = custom.library(
        "custom_square_of_tests", custom.functor(custom._trees(SQUARE, None, params), params), ""
    )
    if found is None:
        pytest.skip(f"{why}; the tests without this fixture run natively")
    return found


def compiled_as(monkeypatch, address: int) -> list[str]:
    """Takes that library for whatever is to be compiled, and lists what that was."""
    asked: list[str] = []
    monkeypatch.setattr(custom, "library", lambda op, source, name: (asked.append(op) or address, ""))
    return asked


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 5), torch.randn(6, 5)


WRONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "identifier for the name of a loss": ("größe", "x - t", {}),
    "at most 100 letters in the name of a loss, got 300": ("n" * 300, "x - t", {}),
    "nested too deeply, or has too many terms": ("deep", "x" + " + x" * 3000, {}),
    "nested too deeply": ("deep", "(" * 3000 + "x" + ")" * 3000, {}),
    "identifier for the name of a parameter, got 'größe'": ("wrong", "x - t", {"größe": 1.0}),
    "cannot be named reduction": ("wrong", "x - t", {"reduction": 1.0}),
    "d/dx = 3 is .* where a difference of values gives": ("wrong", "x - t", {}),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_work_is_told_before_a_compiler_runs(monkeypatch, text):
    monkeypatch.setattr(custom, "library", None)
    name, value, params = WRONG[text]
    with pytest.raises(ValueError, match=text):
        fusedloss.pointwise_loss(name, value, "3" if "d/dx" in text else None, params)


@pytest.mark.parametrize("default", [None, "1", 1j, torch.ones(())], ids=repr)
def test_a_default_is_a_number(not_compiled, default):
    with pytest.raises(TypeError, match="scaled: the default of p must be a real number, got "):
        fusedloss.pointwise_loss("scaled", SQUARE, params={"p": default})
    assert fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0})(*data()) > 0


def test_a_parameter_of_a_call_is_a_number(not_compiled):
    loss = fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0})
    for wrong, described in ((1j, "complex"), ("1", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"scaled\(\): argument 'p' must be float, not {described}"):
            loss(*data(), p=wrong)


@needs_extension
@on_cpu_alone("a library for the CPU")
def test_a_failure_leaves_nothing_behind(monkeypatch, address):
    asked = compiled_as(monkeypatch, address)
    for _ in range(2):  # what was compiled is something else
        with pytest.raises(ValueError, match=r"fails: value = .* where PyTorch gives"):
            fusedloss.pointwise_loss("fails", CUBE, params={"p": 2.0})
    with pytest.raises(ValueError, match=r"fails: d/dx = x is .* where a difference of values gives"):
        fusedloss.pointwise_loss("fails", SQUARE, "x", params={"p": 2.0})
    with pytest.raises(TypeError):
        fusedloss.pointwise_loss("fails", SQUARE, params={"p": None})
    loss = fusedloss.pointwise_loss("fails", SQUARE, params={"p": 2.0})
    assert fusedloss.explain(loss, *data()).startswith("fused") and len(asked) == 2


@needs_extension
@on_cpu_alone("a library for the CPU")
def test_threads_that_make_one_loss_compile_it_once(monkeypatch, address):
    asked, start, made = compiled_as(monkeypatch, address), threading.Barrier(4), list[Any]()

    def make(default: float) -> None:
        start.wait()
        try:
            made.append(fusedloss.pointwise_loss("shared", SQUARE, params={"p": default}))
        except Exception as error:
            made.append(error)

    threads = [threading.Thread(target=make, args=(float(default),)) for default in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x, t = data()
    assert len(asked) == 1 and len(made) == 4
    for loss in made:
        torch.testing.assert_close(loss(x, t), loss.params["p"] * (x - t).square().mean())


# ---- as a module


class Model(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer, self.losses = nn.Linear(5, 5), nn.ModuleDict({"own": loss, "other": fusedloss.MSELoss()})

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.losses["own"](self.layer(x), target, "sum", p=3.0) + self.losses["other"](x, target)


def test_it_is_a_module(not_compiled):
    loss = fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0})
    model, (x, t) = Model(loss), data()
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"] and not list(loss.parameters())
    assert "d/dx = 2 * p * (x - t)" in repr(model) and loss in nn.Sequential(loss)
    seen: list[Any] = []
    loss.register_forward_hook(lambda module, given, value: seen.append(value))
    assert torch.equal(loss(x, t), seen[0])
    assert not model.eval().losses["own"].training


def forgets(module: nn.Module, given: Any, value: Tensor) -> Tensor:
    return value * 0


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_module_of_its_own(not_compiled, copied: Callable[[nn.Module], nn.Module]):
    loss = fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0}).eval()
    other, (x, t) = copied(loss), data()
    assert other is not loss and not other.training and torch.equal(other(x, t), loss(x, t))
    other.register_forward_hook(forgets)
    assert copied is copy.copy or loss(x, t) != 0
    assert copied(other)(x, t) == 0
    assert fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0}).training


class Mode(TorchFunctionMode):
    seen: list[Any] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_it_is_one_call_to_torch_function(not_compiled):
    loss, (x, t) = fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0}), data()
    expected = loss(x, t, "none", p=3.0)
    Mode.seen.clear()
    with Mode():
        got = loss(x, t, "none", p=3.0)
    assert Mode.seen == [custom._call] and torch.equal(got, expected)
    got = loss(x.as_subclass(Subclass), t, "none", p=3.0)
    assert type(got) is Subclass and torch.equal(got.as_subclass(Tensor), expected)
    run = torch.compile(lambda x, t: loss(x, t, "none", p=3.0), backend="eager", fullgraph=True)
    got = run(x.as_subclass(Subclass), t)
    assert type(got) is Subclass and torch.equal(got.as_subclass(Tensor), expected)


def test_torch_fx_holds_it_as_one_call(not_compiled):
    model, (x, t) = Model(fusedloss.pointwise_loss("scaled", SQUARE, params={"p": 2.0})), data()
    traced = torch.fx.symbolic_trace(model)
    assert custom._call in [node.target for node in traced.graph.nodes]
    for each in (traced, pickle.loads(pickle.dumps(traced))):
        assert torch.equal(each(x, t), model(x, t))
