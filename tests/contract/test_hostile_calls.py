"""Calls that no program should make: an error, torch's where torch has one; never a crash or other numbers."""

import pytest
import torch
import torch.nn.functional as F
from losses import ONE_OF_EACH, SOFTMAX, each_of, traits
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss
import fusedloss.functional as L

OPS = torch.ops.fusedloss
OVERLAP = "refer to a single memory location"
ROWS = [loss for loss in SOFTMAX if loss in ONE_OF_EACH]


# ---- the raw ops that overwrite a tensor


def in_place_calls(data: Tensor, loss):
    """Every raw op that may overwrite `data` (4, 5), of one softmax loss."""
    x, y = loss.data((4, 5), torch.float32)
    call = (y, None)
    middle = (1, -100, list(loss.params))
    statistics = getattr(OPS, loss.op)(x, *call, *middle)[2]
    upstream = torch.tensor(2.0)
    calls = {
        "scale_": lambda: OPS.scale_(data, upstream),
        "backward_": lambda: getattr(OPS, f"{loss.op}_backward_")(upstream, None, data, *call, statistics, *middle),
    }
    if traits(loss.op).reads_row:
        calls["with_grad_"] = lambda: getattr(OPS, f"{loss.op}_with_grad_")(data, *call, *middle)
    return calls.items()


@needs_extension
@each_of(ROWS)
def test_no_op_overwrites_a_view_that_is_no_memory_of_its_own(loss):
    x = torch.randn(4, 5)
    hostile = {
        "negated view": torch._neg_view(x),
        "ZeroTensors are immutable": torch._efficientzerotensor((4, 5)),
        "more than one element of the written-to tensor": x[:1].expand(4, 5),
    }
    for message, data in hostile.items():
        for _, call in in_place_calls(data, loss):
            with pytest.raises(RuntimeError, match=message):
                call()
            with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
                call()
    assert x._version == 0


@needs_extension
@each_of(ROWS)
def test_an_op_that_overwrites_counts_as_a_change_and_has_no_derivative(loss):
    for name, call in in_place_calls(data := torch.randn(4, 5), loss):
        before = data._version
        call()
        assert data._version == before + 1, name
    leaf = torch.randn(4, 5, requires_grad=True)
    for message, hostile in {
        "a leaf Variable that requires grad": leaf,
        "a view of a leaf Variable that requires grad": leaf.view(4, 5),
        "is a view": leaf.unbind(0)[0],
        "has no derivative": leaf * 1,
    }.items():
        for _, call in in_place_calls(hostile, loss):
            with pytest.raises(RuntimeError, match=message):
                call()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(4, 5), torch.ones(4, 5))
        for _, call in in_place_calls(dual, loss):
            with pytest.raises(RuntimeError, match="has no derivative"):
                call()
    for _, call in in_place_calls(leaf, loss):
        with torch.no_grad():
            call()
    assert leaf._version == len(in_place_calls(leaf, loss))


@needs_extension
def test_an_overwritten_tensor_is_noticed_by_a_backward_that_reads_it():
    w = torch.randn(4, 5, requires_grad=True)
    square = w.square().sum()
    with torch.no_grad():
        OPS.scale_(w, torch.tensor(3.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@needs_extension
def test_what_is_only_read_may_be_a_view_of_any_kind():
    data, factor = torch.ones(3), torch._neg_view(torch.tensor(2.0))
    OPS.scale_(data, factor)
    assert torch.equal(data, torch.full((3,), -2.0))
    for upstream in (factor, torch._efficientzerotensor(())):
        for loss in ONE_OF_EACH:
            input, target = loss.data((4, 5), torch.float32)
            value = loss.fused(input.requires_grad_(), target, "mean")
            (found,) = torch.autograd.grad(value, input, upstream)
            value = loss.fused(input, target, "mean")
            (expected,) = torch.autograd.grad(value, input, upstream.clone().resolve_neg())
            assert torch.equal(found, expected)


@needs_extension
def test_scaling_refuses_what_it_would_read_while_it_writes():
    data = torch.ones(6)
    with pytest.raises(RuntimeError, match=OVERLAP):
        OPS.scale_(data, data[1])
    with pytest.raises(RuntimeError, match="expected floating point data"):
        OPS.scale_(torch.ones(3, dtype=torch.complex64), torch.tensor(2.0))


# ---- logits that share their memory with what is read


def shared(dtype=torch.float64):
    """Logits that are no leaf, and the same memory as class indices."""
    logits = torch.zeros(600, 40, dtype=dtype, requires_grad=True) * 1
    return logits, logits.detach().view(torch.int64).view(-1)


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("what", ["target", "end", "weight", "probabilities"])
def test_a_gradient_over_its_own_target_or_weight(what, grad_in_forward):
    x, indices = shared()
    target, weight = torch.zeros(600, dtype=torch.int64), None
    if what == "weight":
        weight = x.detach()[0]
    elif what == "probabilities":
        target = x.detach()
    else:
        target = indices[:600] if what == "target" else indices[-600:]
    run = lambda **options: L.cross_entropy(x, target, weight, reduction="sum", **options)  # noqa: E731
    if fusedloss.explain(L.cross_entropy, x, target, weight).startswith("native"):
        pytest.skip("nothing is overwritten natively")
    with pytest.raises(RuntimeError, match=OVERLAP):
        run(inplace=True, grad_in_forward=grad_in_forward)
    assert not x.detach().any() and torch.isfinite(run())


@needs_extension
@each_of(ROWS)
def test_raw_ops_refuse_shared_memory(loss):
    x, target = loss.data((4, 5), torch.float64)
    middle = (1, -100, list(loss.params))
    statistics = getattr(OPS, loss.op)(x, target, None, *middle)[2]
    before = x.clone()
    backward = getattr(OPS, f"{loss.op}_backward_")
    for upstream, weight in [(x.view(-1)[3], None), (torch.tensor(1.0).double(), x[1])]:
        with pytest.raises(RuntimeError, match=OVERLAP):
            backward(upstream, None, x, target, weight, statistics, *middle)
    if traits(loss.op).reads_row:
        with pytest.raises(RuntimeError, match=OVERLAP):
            getattr(OPS, f"{loss.op}_with_grad_")(x, target, x[1], *middle)
    assert torch.equal(x, before)


def test_memory_in_alternation_is_no_overlap():
    both = torch.randn(6, 5, 2, dtype=torch.float64)
    both[..., 1] = both[..., 1].softmax(1)
    leaf = both.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(leaf[..., 0], both[..., 1]), leaf)[0]
    pair = leaf * 1
    value = L.cross_entropy(pair[..., 0], pair.detach()[..., 1], inplace=True, grad_in_forward=True)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], expected)


@needs_extension
@on_cpu_alone("numpy shares the CPU's memory alone; test_raw_ops_refuse_shared_memory runs there")
def test_one_memory_in_two_storages():
    numbers = torch.zeros(600, 40, dtype=torch.float64).numpy()
    x, y = torch.from_numpy(numbers), torch.from_numpy(numbers).view(torch.int64).view(-1)[-600:]
    expected = OPS.cross_entropy_with_grad(x, y, None, 2, -100, [0.0, 0.0, 0.0])
    loss, _ = OPS.cross_entropy_with_grad_(x, y, None, 2, -100, [0.0, 0.0, 0.0])
    assert torch.equal(loss, expected[0]) and torch.equal(x, expected[2])


def test_a_view_of_a_leaf_is_not_overwritten():
    leaf = torch.randn(4, 5, requires_grad=True)
    if fusedloss.explain(L.cross_entropy, leaf, torch.arange(4)).startswith("native"):
        pytest.skip("nothing is overwritten natively")
    for logits in (leaf, leaf.view(4, 5), leaf[:]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an in-place"):
            L.cross_entropy(logits, torch.arange(4), inplace=True)


@pytest.mark.parametrize("grad_in_forward", [None, False, True])
def test_a_hook_that_raises_finds_the_logits_as_they_were(grad_in_forward):
    x = torch.randn(4, 5, requires_grad=True)
    logits = x * 1
    before = logits.detach().clone()

    def refuse(tensor):
        raise KeyError("refused")

    options = {"inplace": True, "grad_in_forward": grad_in_forward}
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor), pytest.raises(KeyError):
        L.cross_entropy(logits, torch.arange(4), **options)
    assert torch.equal(logits, before)
    with torch.autograd.graph.save_on_cpu():
        (found,) = torch.autograd.grad(L.cross_entropy(logits, torch.arange(4), **options), x)
    torch.testing.assert_close(found, torch.autograd.grad(F.cross_entropy(x, torch.arange(4)), x)[0])
