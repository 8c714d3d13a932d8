"""With this package's functions put in the place of torch's, what runs natively still runs torch's own."""

import pytest
import torch
import torch.nn.functional as F
from losses import GPU, LOSSES, each_of

import fusedloss
import fusedloss.functional as L

TWINS = [name for name in L.__all__ if hasattr(F, name)]


def declined_and_derivatives(loss):
    x, target = loss.data((6, 5), torch.float64)
    x.requires_grad_()
    results = [loss.fused(x.detach().to("meta"), target.to("meta"), "none").shape]
    value = loss.fused(x, target, "mean")
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    second = torch.autograd.grad(grad.square().sum(), x) if grad.requires_grad else []  # linear in the input
    return [*results, value.detach(), grad.detach(), *second]


@each_of(LOSSES)
def test_patched_functions_call_torchs_own(loss, monkeypatch):
    expected = declined_and_derivatives(loss)
    for name in TWINS:
        monkeypatch.setattr(F, name, getattr(L, name))
    shape, *results = declined_and_derivatives(loss)
    assert shape == expected[0]
    for result, before in zip(results, expected[1:], strict=True):
        assert torch.equal(result, before)


def test_a_patched_module_runs_fused(monkeypatch):
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, -100])
    for name in TWINS:
        monkeypatch.setattr(F, name, getattr(L, name))
    loss = torch.nn.CrossEntropyLoss()(x, y)
    assert loss.grad_fn.name() == "fusedloss::CrossEntropyBackward"
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        torch.nn.CrossEntropyLoss()(x, y + 3)
        if x.device.type == GPU:  # tells it later
            torch.get_device_module(GPU).synchronize()
            fusedloss.check()
