"""`LinearCrossEntropyLoss`: torch's constructor and state, and heads that are there."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import warned
from linear_calls import indices, operands
from torch import nn

import fusedloss
import fusedloss.functional as L
from fusedloss import LinearCrossEntropyLoss

TORCHS = getattr(nn, "LinearCrossEntropyLoss", None)
needs_torchs = pytest.mark.skipif(TORCHS is None, reason="torch has it from 2.13 on")
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "positions": {"out_features": (2, 3), "bias": True},
    "weight": {"weight": torch.linspace(1, 2, 11, device="cpu"), "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1, "reduction": "none", "ignore_index": 3},
    "dtype": {"dtype": torch.float64},
}


@needs_torchs
@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_torchs_with_torchs_state(option):
    options = {
        name: each.to(torch.get_default_device()) if isinstance(each, torch.Tensor) else each
        for name, each in OPTIONS[option].items()
    }
    torchs, own = TORCHS(6, 11, **options), LinearCrossEntropyLoss(6, 11, **options)
    assert isinstance(own, TORCHS) and repr(own) == repr(torchs)
    assert list(own.state_dict()) == list(torchs.state_dict())
    assert own.load_state_dict(torchs.state_dict()).missing_keys == []
    positions = options.get("out_features", ())
    input, target = operands(dtype=options.get("dtype", torch.float32))[0], indices(positions=positions)
    if "ignore_index" in options:
        target = torch.where(target < 0, 3, target)
    got, expected = own(input, target), torchs(input, target)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    got_grads = [input.grad, *(each.grad for each in own.parameters())]
    input.grad = None
    expected.sum().backward()
    torch.testing.assert_close(got_grads, [input.grad, *(each.grad for each in torchs.parameters())])


@needs_torchs
@pytest.mark.parametrize(
    "options", [{"weight": torch.ones(3, device="cpu")}, {"label_smoothing": 2.0}, {"label_smoothing": -1.0}], ids=str
)
def test_it_refuses_what_torch_refuses(options):
    got, expected = (warned(lambda: module(6, 11, **options))[0] for module in (LinearCrossEntropyLoss, TORCHS))  # noqa: B023
    assert got == expected and isinstance(got, tuple)


def test_it_names_an_argument_that_there_is_not():
    with pytest.raises(TypeError, match="unexpected keyword argument 'z_los'"):
        LinearCrossEntropyLoss(6, 11, z_los=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        LinearCrossEntropyLoss.from_linear(nn.Linear(6, 11), bias=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_a_head_that_is_there_is_shared(positions, bias):
    head = nn.Linear(6, 11 * (2 if positions else 1), bias=bias)
    loss = LinearCrossEntropyLoss.from_linear(head, out_features=positions, z_loss=0.1, chunk_rows=5)
    assert loss.linear is head and loss.num_classes == 11
    input, target = operands()[0], indices(positions=positions)
    z = head(input).reshape(23, 11, *positions)
    torch.testing.assert_close(loss(input, target), L.cross_entropy(z, target, z_loss=0.1))
    weight, divisor = torch.rand(target.shape), torch.tensor(9.0)
    torch.testing.assert_close(
        loss(input, target, weight, divisor),
        L.cross_entropy(z, target, z_loss=0.1, sample_weight=weight, reduction="sum") / 9,
    )


def test_a_head_tied_to_an_embedding_gets_both_gradients():
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    loss, target = LinearCrossEntropyLoss.from_linear(head, shift=1), indices((4, 6)).clamp_min(0)
    loss(embedding(target), target).backward()
    got, embedding.weight.grad = embedding.weight.grad, None
    F.cross_entropy(head(embedding(target))[:, :-1].flatten(0, 1), target[:, 1:].flatten()).backward()
    torch.testing.assert_close(got, embedding.weight.grad)
    assert len(list(nn.Sequential(embedding, loss).parameters())) == 1


def test_outputs_that_are_no_multiple_of_the_positions():
    for positions in ((4,), (0,), (2, 3)):
        with pytest.raises(ValueError, match="expected a head whose 11 outputs are classes for each of"):
            LinearCrossEntropyLoss.from_linear(nn.Linear(6, 11), out_features=positions)


def test_copies_and_pickles_are_the_same():
    loss = LinearCrossEntropyLoss(6, 11, bias=True, weight=torch.ones(11), z_loss=0.1, softcap=3.0, shift=1)
    input, target = operands()[0], indices()
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is LinearCrossEntropyLoss and repr(other) == repr(loss)
        assert other.linear.weight is not loss.linear.weight
        assert torch.equal(other(input, target), loss(input, target))
    assert "z_loss=0.1, softcap=3.0, shift=1" in repr(loss)


@needs_torchs
def test_torchscript_gets_torchs_module_or_is_refused():
    for options in ({"z_loss": 0.1}, {"ignore_index": [1, 2]}):
        with pytest.raises(RuntimeError, match="knows none of our keywords"):
            torch.jit.script(LinearCrossEntropyLoss(6, 11, **options))
    own = LinearCrossEntropyLoss(6, 11)
    native = own.__prepare_scriptable__()
    assert type(native) is TORCHS and native.linear is own.linear
    input, target = operands()[0], indices()
    torch.testing.assert_close(native(input, target), own(input, target))
    got, expected = (warned(lambda: torch.jit.script(module))[0] for module in (own, TORCHS(6, 11)))  # noqa: B023
    assert type(got) is type(expected)


def test_it_may_be_called_functionally():
    loss = LinearCrossEntropyLoss(6, 11)
    input, target = operands()[0], indices()
    weight = torch.randn(11, 6)
    got = torch.func.functional_call(loss, {"linear.weight": weight}, (input, target))
    torch.testing.assert_close(got, F.cross_entropy(input @ weight.T, target))


def test_it_is_public():
    assert fusedloss.LinearCrossEntropyLoss is LinearCrossEntropyLoss
    assert {"linear_cross_entropy", "linear_focal_loss", "linear_log_probs"} <= set(L.__all__)
