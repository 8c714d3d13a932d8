"""The modules where training loops put them, beside torch's: optimizers, scalers, parametrizations, averages, hooks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import same, upstream_of, warned
from marks import needs_extension, on_cpu_alone
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fusedloss
import fusedloss.functional as L

CLASSES = 5


def of_classes() -> Tensor:
    return torch.linspace(0.5, 2, CLASSES)


# By a name: what it takes for targets, and how it is made of torch.nn or of this package.
MODULES: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "cross-entropy": ("indices", lambda of: of.CrossEntropyLoss(of_classes(), label_smoothing=0.1)),
    "probabilities": ("probabilities", lambda of: of.CrossEntropyLoss(of_classes(), reduction="sum")),
    "nll": ("indices", lambda of: of.NLLLoss(of_classes())),
    "mse": ("numbers", lambda of: of.MSELoss()),
    "l1": ("numbers", lambda of: of.L1Loss(reduction="sum")),
    "smooth l1": ("numbers", lambda of: of.SmoothL1Loss(beta=0.5)),
    "huber": ("numbers", lambda of: of.HuberLoss(reduction="none", delta=0.7)),
    "bce": ("of probabilities", lambda of: of.BCELoss(of_classes())),
    "logits": ("numbers", lambda of: of.BCEWithLogitsLoss(of_classes(), pos_weight=of_classes())),
}
each_module = pytest.mark.parametrize("name", MODULES)


class Model(nn.Module):
    """A layer and a loss."""

    def __init__(self, kind: str, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(CLASSES, CLASSES)
        self.loss = loss
        self.of_probabilities = kind == "of probabilities"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        scores = self.layer(input)
        return self.loss(scores.sigmoid() if self.of_probabilities else scores, target)


def data(kind: str, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(rows, CLASSES, generator=generator, device="cpu")
    t = torch.rand(rows, CLASSES, generator=generator, device="cpu")
    if kind == "indices":
        t = torch.arange(rows, device="cpu") % CLASSES
    device = torch.get_default_device()
    return x.to(device), (t.softmax(1) if kind == "probabilities" else t).to(device)


def in_both(name: str, run: Callable[[Model, Tensor, Tensor], Any], **tolerance: Any) -> None:
    """The same results, or the same error, with torch's module and with ours."""
    kind, make = MODULES[name]
    torchs, ours = (warned(lambda of=of: run(Model(kind, make(of)), *data(kind)))[0] for of in (nn, fusedloss))
    if isinstance(torchs, tuple) and isinstance(torchs[0], type):
        assert ours == torchs
    else:
        same(ours, torchs, **tolerance)


def step(model: Model, input: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    value = model(input, target)
    value.backward(upstream_of(value))
    return [value.detach(), *[each.grad for each in model.parameters() if each.grad is not None]]


@each_module
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_with_a_scaler_that_meets_an_overflow(name, set_to_none):
    def run(model: Model, input: Tensor, target: Tensor) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(input.device.type, init_scale=1024.0, growth_interval=2)
        seen = []
        for factor in (1.0, float("inf"), 1.0, 1.0):
            optimizer.zero_grad(set_to_none=set_to_none)
            scaler.scale(model(input, target).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            seen += [model.layer.weight.detach().clone(), torch.tensor(scaler.get_scale())]
        return seen

    in_both(name, run)


@each_module
def test_a_closure_of_lbfgs(name):
    def run(model: Model, input: Tensor, target: Tensor) -> Tensor:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = model(input, target).sum()
            value.backward()
            return value

        optimizer.step(closure)
        return model.layer.weight.detach()

    in_both(name, run)


class Twice(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


@each_module
def test_parametrized_buffers_and_a_parametrized_layer(name):
    def run(model: Model, input: Tensor, target: Tensor) -> list[Tensor]:
        parametrize.register_parametrization(model.layer, "weight", Twice())
        for buffer, _ in list(model.loss.named_buffers()):
            parametrize.register_parametrization(model.loss, buffer, Twice())
        return step(model, input, target)

    in_both(name, run)


@each_module
@pytest.mark.parametrize("requires_grad", [True, False])
def test_buffers_that_became_parameters(name, requires_grad):
    def run(model: Model, input: Tensor, target: Tensor) -> list[Tensor]:
        for buffer, value in list(model.loss.named_buffers()):
            delattr(model.loss, buffer)
            model.loss.register_parameter(buffer, nn.Parameter(value, requires_grad=requires_grad))
        return step(model, input, target)

    in_both(name, run)


@each_module
def test_averages_copies_and_conversions(name):
    def run(model: Model, input: Tensor, target: Tensor) -> list[Tensor]:
        averaged = AveragedModel(model, use_buffers=True)
        averaged.update_parameters(model)
        averaged.update_parameters(copy.deepcopy(model))
        shared = copy.deepcopy(model).share_memory() if input.device.type == "cpu" else model
        swap = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            double = copy.deepcopy(model).double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
        wide = [input.double(), target.double() if target.is_floating_point() else target]
        return [averaged(input, target).detach(), *step(shared, input, target), *step(double, *wide)]

    in_both(name, run)


@each_module
def test_hooks_on_the_nodes_of_the_graph(name):
    def run(model: Model, input: Tensor, target: Tensor) -> list[Any]:
        seen = []
        model.layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
        value = model(input, target)
        value.grad_fn.register_prehook(lambda upstreams: seen.append(upstreams[0].clone()))
        value.grad_fn.register_hook(lambda of_inputs, upstreams: seen.append(upstreams[0].clone()))
        with torch.autograd.set_multithreading_enabled(False):
            value.backward(upstream_of(value))
        return seen

    in_both(name, run)


@each_module
@on_cpu_alone("torch's default device is a function mode, under which other tests run on a GPU")
def test_a_default_dtype_and_a_default_device(name):
    kind, make = MODULES[name]

    def run(model: Model, input: Tensor, target: Tensor) -> list[Any]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        try:
            results = step(model, input, target)
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        with torch.device("meta"):
            of = nn if type(model.loss).__module__.startswith("torch") else fusedloss
            empty = Model(kind, make(of))
            described = step(empty, *[torch.empty_like(each) for each in (input.to("meta"), target.to("meta"))])
        return [*results, *[torch.tensor([*each.shape, *each.stride()], device="cpu") for each in described]]

    in_both(name, run)


@each_module
def test_the_flops_of_a_step(name):
    def run(model: Model, input: Tensor, target: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counted:
            step(model, input, target)
        return torch.tensor(counted.get_total_flops())

    in_both(name, run)


# ---- profilers

STEPS = {
    "cross_entropy_with_grad": lambda x: L.cross_entropy(x, x.softmax(1).argmax(1)),
    "cross_entropy_backward": lambda x: L.cross_entropy(x, x.softmax(1).argmax(1), reduction="none"),
    "mse_with_grad": lambda x: L.mse_loss(x, x.detach()),
    "mse_backward": lambda x: L.mse_loss(x, x.detach(), reduction="none"),
    "nll_backward": lambda x: L.nll_loss(x, x.softmax(1).argmax(1)),
}


@needs_extension
@on_cpu_alone("on a GPU forward makes other gradients; the names are the same")
@pytest.mark.parametrize("op", STEPS)
def test_a_profiler_names_the_ops_and_the_nodes_of_backward(op):
    x = torch.randn(6, CLASSES, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        STEPS[op](x).sum().backward()
    names = {event.name for event in profiled.events()}
    assert f"fusedloss::{op}" in names
    loss = {"cross": "CrossEntropy", "mse": "Mse", "nll": "Nll"}[op.split("_")[0]]
    assert f"fusedloss::{loss}Backward" in names
