"""fusedloss.patch(): the losses of other packages become fused, and nothing else changes."""

import pickle
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from marks import needs_extension, not_under_a_default_device, on_cpu_alone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_before
from torch.overrides import TorchFunctionMode

import fusedloss
import fusedloss.functional as L
from fusedloss.adoption._places import places

NAMES = [place.name for place in places("torch")]
X, T = torch.linspace(-2, 2, 20, device="cpu").view(4, 5), torch.tensor([0, 4, 2, -100], device="cpu")
PLACE = "torch.nn.functional.cross_entropy"


def ran_fused(run) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run()
    return any(event.name().startswith("fusedloss::") for event in profiled.profiler.kineto_results.events())


def value_and_grad(function) -> list[Tensor]:
    x = X.clone().requires_grad_()
    value = function(x, T)
    value.backward()
    return [value.detach(), x.grad]


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = {name: getattr(F, name) for name in NAMES}
    yield
    assert {name: getattr(F, name) for name in NAMES} == before


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_functions_and_modules_are_fused_and_undone():
    expected = value_and_grad(nn.CrossEntropyLoss())
    with fusedloss.patch() as patched:
        for loss in (
            nn.CrossEntropyLoss(),
            lambda x, t: F.cross_entropy(x, t),
            lambda x, t: F.cross_entropy(x, target=t),
        ):
            torch.testing.assert_close(value_and_grad(loss), expected)
            assert ran_fused(lambda: loss(X, T))  # noqa: B023
        assert patched.report().calls[PLACE][:2] == (6, 0)
        assert str(patched.report()).startswith(f"{PLACE}: 6 fused, 0 native")
    assert not ran_fused(lambda: nn.CrossEntropyLoss()(X, T))


def test_every_function_of_torch_that_has_a_loss_here_is_a_place():
    assert {"cross_entropy", "nll_loss", "huber_loss", "binary_cross_entropy_with_logits", "kl_div"} <= set(NAMES)
    assert set(NAMES) == {name for name in L.__all__ if hasattr(F, name)}
    with fusedloss.patch():
        for name in NAMES:
            function = getattr(F, name)
            assert function.__name__ == name and function.__module__ == "torch.nn.functional"
            assert pickle.loads(pickle.dumps(function)) is function


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_native_calls_are_told_with_the_reason_and_the_line():
    with fusedloss.patch() as patched:
        for _ in range(3):
            F.cross_entropy(X, X.softmax(1).requires_grad_())
        line = sys._getframe().f_lineno - 1
        with pytest.raises(ValueError):
            F.cross_entropy(X, T[:2])
        F.cross_entropy(X, T)
        with fusedloss.patch() as later:
            F.mse_loss(X, X)
        report, of_later = patched.report(), later.report().calls
    why, here = "the probabilities require a gradient", f"{__file__}:{line}"
    assert report.calls[PLACE] == (1, 3, {why: (3, here)})
    assert f"    3 x {why} (first at {here})" in str(report)
    assert of_later == {"torch.nn.functional.mse_loss": (1, 0, {})}


@on_cpu_alone("the operands are the CPU's")
def test_nested_patches_are_undone_in_any_order():
    original = F.cross_entropy
    first, second = fusedloss.patch(), fusedloss.patch("torch")
    replaced = F.cross_entropy
    F.cross_entropy(X, T)
    assert sum(second.report().calls[PLACE][:2]) == 1
    first.undo()
    assert F.cross_entropy is replaced
    first.undo()  # a second time it does nothing
    assert F.cross_entropy is replaced
    second.undo()
    assert F.cross_entropy is original


def test_what_another_put_there_stays_and_is_told():
    original = F.mse_loss
    patched = fusedloss.patch()
    F.mse_loss = another = lambda *_: None
    try:
        with pytest.warns(UserWarning, match="torch.nn.functional.mse_loss: no longer what patch"):
            patched.undo()
        assert F.mse_loss is another
    finally:
        F.mse_loss = original


def test_an_exception_inside_undoes_it():
    original = F.huber_loss
    with pytest.raises(KeyError), fusedloss.patch():
        raise KeyError
    assert F.huber_loss is original


@pytest.mark.parametrize("packages", [("torch", "tensorflow"), ("",), (None,)], ids=str)
def test_an_unknown_package_changes_nothing(packages):
    with pytest.raises(ValueError, match="expected one of 'torch', 'torchvision', 'transformers', 'timm', got"):
        fusedloss.patch(*packages)


def test_a_package_that_is_not_installed_changes_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="timm"):
        fusedloss.patch("torch", "timm")


class Labelled(Tensor):
    """Knows torch's function, not ours."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "known" if func is imported_before else super().__torch_function__(func, types, args, kwargs or {})


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@on_cpu_alone("the operands are the CPU's")
def test_subclasses_and_modes_see_torchs_functions():
    with fusedloss.patch():
        assert F.cross_entropy(X.as_subclass(Labelled), T) == "known"
        assert F.cross_entropy(input=X, target=T.as_subclass(Labelled)) == "known"
        with Watch() as watch:
            F.cross_entropy(X, T)
    assert imported_before in watch.seen and not any(f.__module__.startswith("fusedloss") for f in watch.seen)


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_transforms_tracing_and_export_take_the_originals():
    class Model(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(x, t)

    expected = F.cross_entropy(X, T)
    with fusedloss.patch():
        assert not ran_fused(lambda: torch.func.grad(F.cross_entropy)(X, T))
        scripted = torch.jit.script(nn.CrossEntropyLoss())
        traced = torch.jit.trace(lambda x: F.cross_entropy(x, T), X)
        exported = torch.export.export(Model(), (X, T))
    for made in (lambda: scripted(X, T), lambda: traced(X), lambda: exported.module()(X, T)):
        torch.testing.assert_close(made(), expected)
        assert not ran_fused(made)


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_a_compiled_module_keeps_the_op():
    torch._dynamo.reset()
    x, t = torch.randn(64, 1000, requires_grad=True), torch.arange(64)  # few elements are left to the compiler
    with fusedloss.patch():
        loss = torch.compile(nn.CrossEntropyLoss(), backend="aot_eager", fullgraph=True)
        assert ran_fused(lambda: loss(x, t))
        torch.testing.assert_close(loss(x, t), imported_before(x, t))
    torch._dynamo.reset()
    assert not ran_fused(lambda: loss(x, t))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "kl_div"])
@not_under_a_default_device
def test_warnings_name_the_callers_line(name):
    def where() -> list[tuple[str, str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(F, name)(torch.zeros(2, 1), torch.zeros(2))
        return [(str(each.message), each.filename) for each in caught]

    expected = where()
    with fusedloss.patch():
        assert where() == expected
    assert expected and all(file == __file__ for _, file in expected)


class Own(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


@on_cpu_alone("the operands are the CPU's")
def test_the_losses_of_one_model_become_ours_in_place():
    model = nn.ModuleDict({"a": nn.CrossEntropyLoss(label_smoothing=0.1), "b": nn.MSELoss(), "own": Own()})
    keys, pickled = list(model.state_dict()), pickle.dumps(model["a"])
    expected = model["a"](X, T)
    with fusedloss.patch(model=model) as patched:
        assert type(model["a"]) is fusedloss.CrossEntropyLoss and isinstance(model["a"], nn.CrossEntropyLoss)
        assert type(model["b"]) is fusedloss.MSELoss and type(model["own"]) is Own
        assert patched.report().modules == ["a", "b"] and patched.report().calls == {}
        torch.testing.assert_close(model["a"](X, T), expected)
        assert list(model.state_dict()) == keys
        assert F.cross_entropy is imported_before
    assert type(model["a"]) is nn.CrossEntropyLoss and pickle.dumps(model["a"]) == pickled


def test_a_model_without_a_loss_and_what_is_no_model_are_refused():
    with pytest.raises(ValueError, match="expected a model that holds a loss of torch.nn, got Linear"):
        fusedloss.patch("torch", model=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        fusedloss.patch(model=3)


def test_a_module_that_changed_its_class_is_told():
    loss = nn.CrossEntropyLoss()
    patched = fusedloss.patch(model=loss)
    loss.__class__ = Own
    with pytest.warns(UserWarning, match="no longer what patch"):
        patched.undo()
    assert type(loss) is Own


def test_names_that_were_imported_before():
    here = f"{__name__}.imported_before"
    original = imported_before
    with fusedloss.patch() as patched:
        assert here in patched.report().copies
    with fusedloss.patch(rebind=True) as patched:
        assert imported_before is F.cross_entropy and here not in patched.report().copies
    assert imported_before is original is F.cross_entropy


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_a_scope_is_of_one_thread_and_reaches_early_names():
    seen = {}
    with fusedloss.scope():
        assert F.cross_entropy is imported_before
        for call in (lambda: nn.CrossEntropyLoss()(X, T), lambda: imported_before(X, T)):
            assert ran_fused(call)
        other = threading.Thread(target=lambda: seen.update(fused=ran_fused(lambda: F.cross_entropy(X, T))))
        other.start()
        other.join()
        assert F.cross_entropy(X.as_subclass(Labelled), T) == "known"
        torch.testing.assert_close(value_and_grad(F.cross_entropy), value_and_grad(L.cross_entropy))
    assert seen == {"fused": False}
    assert not ran_fused(lambda: F.cross_entropy(X, T))


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_a_scope_leaves_modes_transforms_and_tracing_to_torchs_functions():
    with Watch() as watch, fusedloss.scope():
        F.cross_entropy(X, T)
    assert imported_before in watch.seen and not any(f.__module__.startswith("fusedloss") for f in watch.seen)
    with fusedloss.scope():
        traced = torch.jit.trace(lambda x: F.cross_entropy(x, T), X)
        exported = torch.export.export(nn.CrossEntropyLoss(), (X, T))
        assert not ran_fused(lambda: torch.func.grad(F.cross_entropy)(X, T))
    assert not ran_fused(lambda: traced(X)) and not ran_fused(lambda: exported.module()(X, T))


COMPILED = """
import torch, torch.nn.functional as F, fusedloss
from torch.overrides import TorchFunctionMode

class Plain(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

def backend(graph, _):
    ops.update(str(node.target) for node in graph.graph.nodes)
    return graph

ops = set()
x, t = torch.randn(64, 1000, requires_grad=True), torch.arange(64)  # few elements are left to the compiler
loss = torch.compile(lambda x, t: F.cross_entropy(x, t), backend=backend, fullgraph=True)
with fusedloss.scope():
    torch.testing.assert_close(loss(x, t), F.cross_entropy(x, t))
assert "fusedloss.cross_entropy" in ops, ops
ops.clear()
loss(x, t)
with Plain(), fusedloss.scope():  # a mode that knows torch's function
    loss(x, t)
assert ops and not any(op.startswith("fusedloss") for op in ops), ops
"""


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_a_compiled_call_within_a_scope_keeps_the_op():
    """In a process of its own: torch.compile lists torch's functions once, and a patch may have stood there then."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


@needs_extension
@on_cpu_alone("the operands are the CPU's")
def test_torchvisions_focal_loss_in_both_its_places(monkeypatch):
    """torchvision does not import beside a CPU build of torch; these modules have its names."""

    def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
        raise AssertionError("the original ran")

    ops, focal = types.ModuleType("torchvision.ops"), types.ModuleType("torchvision.ops.focal_loss")
    for name, module in (
        ("torchvision", types.ModuleType("torchvision")),
        (ops.__name__, ops),
        (focal.__name__, focal),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    ops.sigmoid_focal_loss = focal.sigmoid_focal_loss = sigmoid_focal_loss
    with fusedloss.patch("torchvision"):
        for module in (ops, focal):
            got = module.sigmoid_focal_loss(inputs=X, targets=(X > 0).float(), alpha=0.5, reduction="mean")
            torch.testing.assert_close(got, L.sigmoid_focal_loss(X, (X > 0).float(), 0.5, 2, "mean"))
        assert F.cross_entropy is imported_before
    assert ops.sigmoid_focal_loss is focal.sigmoid_focal_loss is sigmoid_focal_loss
