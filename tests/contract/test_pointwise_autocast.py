"""Pointwise losses under autocast: float32 results no less exact than torch's, and no cast of a half operand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import autocast, error, outcome, same, value_and_grads
from losses import DTYPES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import Recorder
from pointwise_calls import (
    AUTOCAST,
    EVERY_DTYPE,
    EVERY_HALF,
    EVERY_REDUCTION,
    FUSED_UNDER_AUTOCAST,
    as_double,
    fused,
    made,
)
from torch import Tensor

import fusedloss.functional as L


@pytest.mark.thinned
@pytest.mark.parametrize("other", [None, torch.float32], ids=["half target", "float32 target"])
@EVERY_REDUCTION
@pytest.mark.parametrize("call", AUTOCAST)
@EVERY_HALF
@on_cpu_alone("on a GPU a bfloat16 gradient is made in forward and rounded again by its upstream gradient")
def test_autocast_gives_float32_no_less_exact_than_torchs(dtype, call, reduction, other):
    function, tensors, options = made(call, (40, 30), dtype, other)
    if function in ("mse_loss", "l1_loss") and options:
        # Beside a half one torch's losses are half too, because autocast leaves the operators it is made of alone.
        options["weight"] = options["weight"].float()
    exact = value_and_grads(
        lambda *given: getattr(F, function)(*given, **as_double(options), reduction=reduction),
        *(each.double() for each in tensors),
    )
    with autocast(dtype):
        ours = value_and_grads(getattr(L, function), *tensors, **options, reduction=reduction)
        torchs = value_and_grads(getattr(F, function), *tensors, **options, reduction=reduction)
    assert ours[0].dtype == torchs[0].dtype == torch.float32
    for tensor, of_ours, of_torchs in zip(tensors, ours[1:], torchs[1:], strict=True):
        assert of_ours.dtype == of_torchs.dtype == tensor.dtype
    for got, of_torch, expected in zip(ours, torchs, exact, strict=True):
        hair = 8 * 2**-24 if got.dtype == torch.float32 else 0.01 * torch.finfo(dtype).eps
        assert error(got, expected) <= error(of_torch, expected) + hair


@needs_extension
@pytest.mark.parametrize("call", [*FUSED_UNDER_AUTOCAST, "focal", "focal, weight"])
@EVERY_HALF
def test_autocast_runs_fused_without_a_cast(dtype, call):
    function, (x, t), options = made(call, (6, 5), dtype)
    x.requires_grad_()
    with autocast(dtype), Recorder() as recorder:
        loss = getattr(L, function)(x, t, **options, reduction="sum")
        assert fused(function, x, t, **options, reduction="sum")
    name = function.removesuffix("_loss")
    with_grad = "_with_grad" * (dtype == torch.bfloat16)
    assert loss.dtype == torch.float32
    assert recorder.seen == [f"fusedloss.{name}{with_grad}.default"]


@pytest.mark.parametrize("call", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_leaves_wider_inputs_alone(dtype, call):
    function, tensors, options = made(call, (6, 5), dtype)
    plain = value_and_grads(getattr(L, function), *tensors, **options)
    with autocast(torch.bfloat16):
        got = value_and_grads(getattr(L, function), *tensors, **options)
        of_torch = getattr(F, function)(*tensors, **options)
    assert all(torch.equal(*each) and each[0].dtype == dtype for each in zip(got, plain, strict=True))
    assert of_torch.dtype == dtype


@pytest.mark.parametrize("call", AUTOCAST)
@EVERY_DTYPE
def test_autocast_dtypes(dtype, call):
    different = []
    for other, of_weight, reduction in itertools.product([*DTYPES, torch.int64], DTYPES, REDUCTIONS):
        function, (x, t), options = made(call, (6, 5), dtype, other)
        given = {k: v.to(of_weight) if isinstance(v, Tensor) else v for k, v in options.items()}
        with autocast(torch.bfloat16):
            ours, torchs = (outcome(lambda: getattr(f, function)(x, t, **given, reduction=reduction)) for f in (L, F))  # noqa: B023
        if ours != torchs:
            different.append((other, of_weight, reduction, ours, torchs))
    assert different == []


@pytest.mark.parametrize("call", FUSED_UNDER_AUTOCAST)
@EVERY_HALF
def test_a_double_backward_of_what_ran_under_autocast(dtype, call):
    function, tensors, options = made(call, (4, 3), dtype)
    seconds = []
    for enabled, given, factors in (
        (True, tensors, options),
        (False, [each.double() for each in tensors], as_double(options)),
    ):
        leaves = [each.detach().requires_grad_() for each in given]
        with torch.autocast(leaves[0].device.type, dtype=dtype, enabled=enabled):
            value = getattr((F, L)[enabled], function)(*leaves, **factors, reduction="sum")
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        found = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        seconds.append([value.detach(), *grads, *found])
    assert [each.dtype for each in seconds[0]] == [torch.float32] + [dtype] * 4
    for one, other in zip(*seconds, strict=True):
        same(one.detach().double(), other.detach(), rtol=0.05, atol=0.05)
