"""A loss is a node of torch's autograd graph: whatever torch lets one do with a node does with ours what it does with
torch's own."""

import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from marks import needs_compiler, needs_extension
from torch import Tensor

import fusedloss
import fusedloss.functional as L

pytestmark = needs_extension

Loss = Callable[[Tensor, Tensor], Tensor]
# With the gradient made in forward and in backward; beside the target, and by it too.
LOSSES = ["cross_entropy", "nll_loss", "huber_loss", "mse_loss"]
of_loss = pytest.mark.parametrize("name", LOSSES)


def data(name: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 5, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(torch.get_default_device())
    if name == "cross_entropy":
        return x, torch.tensor([0, 4, 2, 2, -100, 1])
    if name == "nll_loss":
        return x.log_softmax(1), torch.tensor([0, 4, 2, 2, -100, 1])
    return x, x.flip(0) / 3


def both(name: str) -> list[tuple[Loss, Tensor, Tensor]]:
    """Our function and torch's, each with tensors of its own, which require gradients where both can."""
    calls: list[tuple[Loss, Tensor, Tensor]] = []
    for module in (L, F):
        x, target = data(name)
        calls.append((getattr(module, name), x.requires_grad_(), target.requires_grad_(name == "mse_loss")))
    return calls


def gradients(x: Tensor, target: Tensor) -> list[Tensor]:
    return [each.grad for each in (x, target) if each.requires_grad]  # type: ignore[misc]


def outcomes(name: str, run: Callable[[Loss, Tensor, Tensor], list[Tensor]]) -> None:
    """Runs it with our function and with torch's, which must give the same tensors."""
    ours, torchs = (run(*call) for call in both(name))
    assert len(ours) == len(torchs)
    for got, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(got, expected)


def raised(run: Callable[[], object], kind: type[Exception] = RuntimeError) -> str:
    with pytest.raises(kind) as caught:
        run()
    return str(caught.value)


@pytest.mark.parametrize("name", LOSSES[1:])  # torch's cross_entropy is two nodes
def test_its_edges_lead_where_torchs_do(name):
    ours, torchs = (function(x, target).grad_fn.next_functions for function, x, target in both(name))
    assert [(node and node.name(), i) for node, i in ours][: len(torchs)] == [(n and n.name(), i) for n, i in torchs]
    assert all(node is None for node, _ in ours[len(torchs) :])  # of a target that requires no gradient
    function, x, target = both(name)[0]
    value = function(x, target)
    value.grad_fn.metadata["kept"] = 1
    assert value.grad_fn.metadata == {"kept": 1}
    assert repr(value).endswith(f"grad_fn=<{value.grad_fn.name().removeprefix('fusedloss::')}>)")


@of_loss
def test_hooks_change_the_gradients_around_it(name):
    def run(function, x, target):
        seen: list[Tensor] = []
        value = function(x, target)
        value.grad_fn.register_prehook(lambda upstreams: (seen.append(upstreams[0]), (upstreams[0] * 2,))[1])
        value.grad_fn.register_hook(
            lambda grads, upstreams: (seen.append(upstreams[0]), tuple(g if g is None else g * 3 for g in grads))[1]
        )
        value.register_hook(lambda upstream: upstream + 1)
        value.retain_grad()
        (value * 5).backward()
        return [*seen, value.grad, *gradients(x, target)]

    outcomes(name, run)


@of_loss
def test_a_second_backward_is_refused_or_repeats_the_first(name):
    def run(function, x, target):
        value = function(x, target)
        value.backward(retain_graph=True)
        value.backward()
        return gradients(x, target)

    def twice(function, x, target):
        value = function(x, target)
        value.backward()
        return raised(value.backward)

    outcomes(name, run)
    ours, torchs = (twice(*call) for call in both(name))
    assert ours == torchs and "Trying to backward through the graph a second time" in ours


@pytest.mark.parametrize("name", ["cross_entropy", "huber_loss", "mse_loss"])  # that of nll_loss is a constant
def test_a_second_derivative_is_refused_twice_too(name):
    def run(function, x, target):
        (grad,) = torch.autograd.grad(function(x, target), x, create_graph=True)
        v = torch.ones_like(grad)
        (second,) = torch.autograd.grad(grad, x, v)
        return raised(lambda: torch.autograd.grad(grad, x, v)), second

    (ours, second), (torchs, expected) = (run(*call) for call in both(name))
    torch.testing.assert_close(second, expected)
    assert ours == torchs and "Trying to backward through the graph a second time" in ours


@of_loss
def test_what_it_saves_goes_through_hooks(name):
    def run(function, x, target):
        packed: list[Tensor] = []
        unpacked: set[int] = set()

        def pack(tensor: Tensor) -> int:
            packed.append(tensor)
            return len(packed) - 1

        def unpack(i: int) -> Tensor:
            unpacked.add(i)
            return packed[i].clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            value = function(x, target)
        assert packed and not unpacked
        value.backward()
        assert unpacked == set(range(len(packed)))
        return gradients(x, target)

    outcomes(name, run)


@of_loss
def test_a_hook_that_fails_leaves_no_half_made_node(name):
    def refuse(tensor):
        raise ValueError("no room")

    def run(function, x, target):
        with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor):
            message = raised(lambda: function(x, target), ValueError)
        function(x, target).backward()
        return message, gradients(x, target)

    (ours, got), (torchs, expected) = (run(*call) for call in both(name))
    assert ours == torchs == "no room"
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@of_loss
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_it_and_where_it_was_made(name):
    function, x, target = both(name)[0]
    with torch.autograd.detect_anomaly(check_nan=True):
        value = function(x, target)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            message = raised(lambda: value.backward(torch.tensor(torch.nan)))
    assert message == f"Function '{value.grad_fn.name()}' returned nan values in its 0th output."
    (told,) = (str(each.message) for each in caught if "Traceback of forward call" in str(each.message))
    assert "value = function(x, target)" in told


@of_loss
def test_a_dropped_graph_frees_what_it_saved(name):
    class Holder:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    function, x, target = both(name)[0]
    held: list[weakref.ref[Holder]] = []

    def pack(tensor: Tensor) -> Holder:
        holder = Holder(tensor)
        held.append(weakref.ref(holder))
        return holder

    gc.disable()
    try:
        for use in (lambda value: None, lambda value: value.backward()):
            held.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
                value = function(x, target)
            assert held and all(each() is not None for each in held)
            use(value)
            if x.grad is not None:  # a backward frees them, though the graph is there
                assert all(each() is None for each in held)
            del value
            assert all(each() is None for each in held)
    finally:
        gc.enable()


@of_loss
def test_no_upstream_gradient_is_none_for_the_inputs(name):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value * 2

        @staticmethod
        def backward(ctx, upstream):
            return None

    for function, x, target in both(name):
        Stop.apply(function(x, target)).backward()
        assert x.grad is None and target.grad is None


def test_only_the_gradients_that_are_asked_for_are_made():
    def run(function, x, target):
        value = function(x, target)
        found = [torch.autograd.grad(value, each, retain_graph=True)[0] for each in (target, x)]
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        return [*found, *torch.autograd.grad(grad.square().sum(), target)]

    outcomes("mse_loss", run)


def test_a_node_of_a_gradient_has_hooks_and_a_name():
    function, x, target = both("cross_entropy")[0]
    (grad,) = torch.autograd.grad(function(x, target), x, create_graph=True)
    assert grad.grad_fn.name() == "fusedloss::SoftmaxGradientBackward"
    (expected,) = torch.autograd.grad(grad.sum(), x, retain_graph=True)
    grad.grad_fn.register_hook(lambda grads, _: tuple(g if g is None else g * 3 for g in grads))
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), x)[0], 3 * expected)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("cross_entropy", "CrossEntropy"),
        ("nll_loss", "Nll"),
        ("huber_loss", "Huber"),
        ("cosine_embedding_loss", "CosineEmbedding"),
    ],
)
def test_a_printed_loss_names_its_node(name, node):
    if name == "cosine_embedding_loss":
        x = torch.randn(4, 3, requires_grad=True)
        loss = L.cosine_embedding_loss(x, x.detach().flip(0), torch.ones(4))
    else:
        x, target = data(name)
        loss = getattr(L, name)(x.requires_grad_(), target)
    assert loss.grad_fn.name() == f"fusedloss::{node}Backward"
    assert repr(loss).endswith(f"grad_fn=<{node}Backward>)")


@needs_compiler
def test_a_loss_of_ones_own_is_named_as_its_user_named_it():
    x = torch.randn(4, 5, requires_grad=True)
    loss = fusedloss.pointwise_loss("half_square", "square(x - t) / 2")(x, x.detach().flip(0))
    assert loss.grad_fn.name() == "fusedloss::HalfSquareBackward"
