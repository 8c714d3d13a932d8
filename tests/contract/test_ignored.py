"""Several class indices or a mask that say which rows are ignored, and elements that binary losses ignore."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, autocast, same, upstream_of, value_and_grads, warned
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import compiled_with_ops, holds
from torch import Tensor

import fusedloss
import fusedloss.functional as L

NAN = float("nan")
FUNCTIONS: dict[str, tuple[Callable[..., Any], type[torch.nn.Module]]] = {
    "cross_entropy": (L.cross_entropy, fusedloss.CrossEntropyLoss),
    "nll_loss": (L.nll_loss, fusedloss.NLLLoss),
    "focal_loss": (L.focal_loss, fusedloss.FocalLoss),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def data(shape: tuple[int, ...] = (8, 5), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).log_softmax(1).to(dtype)
    t = torch.tensor([0, 4, 2, 3, 2, 1, 4, 0]).expand(*shape[2:], 8).movedim(-1, 0).clone()
    return x, t


# ---- rows


@pytest.mark.parametrize("target", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 3)], ids=str)
@each_function
def test_several_indices_are_ignored_as_one_is(name, shape, target):
    function, module = FUNCTIONS[name]
    x, t = data(shape)
    t = t.to(target)
    for several in ([4], (4, 2, 0), range(3), []):
        ignored = torch.isin(t.long(), torch.tensor(list(several)).long())
        as_one = torch.where(ignored, -100, t.long())
        if fusedloss._library.extension:  # natively an ignored row gives torch's NaN
            x[ignored.unsqueeze(1).expand_as(x)] = NAN
        for reduction in REDUCTIONS:
            got = value_and_grads(lambda x: function(x, t, ignore_index=several, reduction=reduction), x)  # noqa: B023
            expected = value_and_grads(lambda x: function(x, as_one, reduction=reduction), x)  # noqa: B023
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        assert torch.equal(module(ignore_index=several)(x, t), function(x, as_one))
        if fusedloss._library.extension:
            assert fusedloss.explain(function, x, t, ignore_index=several).startswith("fused")
        x = data(shape)[0]


@pytest.mark.parametrize("target", [torch.int64, torch.uint8], ids=str)
@each_function
def test_a_mask_says_which_rows_are_ignored(name, target):
    function, module = FUNCTIONS[name]
    for shape in ((8, 5), (8, 5, 3)):
        x, t = data(shape)
        mask = torch.zeros(t.shape, dtype=torch.bool)
        mask.view(-1)[1::3] = True
        x[mask.unsqueeze(1).expand_as(x)] = NAN
        as_one = torch.where(mask, -100, t)
        for reduction in REDUCTIONS:
            run = lambda x: function(x, t.to(target), ignore_index=mask, reduction=reduction)  # noqa: B023, E731
            expected = value_and_grads(lambda x: function(x, as_one, reduction=reduction), x)  # noqa: B023
            same(value_and_grads(run, x), expected, rtol=0, atol=0)
        assert torch.equal(module(ignore_index=mask)(x, t), function(x, as_one))


@on_cpu_alone("a GPU raises later")
@each_function
def test_beside_a_mask_no_index_is_ignored(name):
    with pytest.raises(IndexError, match="out of bounds"):
        FUNCTIONS[name][0](data()[0], torch.full((8,), -100), ignore_index=torch.zeros(8, dtype=torch.bool))


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss"])
def test_a_mask_beside_probabilities(name, options):
    function, _ = FUNCTIONS[name]
    x, _ = data()
    t = torch.rand(8, 5).softmax(1)
    mask, s = torch.arange(8) % 3 == 1, torch.rand(8) + 0.5
    x[mask] = NAN
    kept = ~mask
    got = value_and_grads(lambda x: function(x, t, ignore_index=mask, **options), x)
    value, grad = value_and_grads(lambda x: function(x, t[kept], **options), x[kept])
    if options.get("reduction") == "none":
        value, grad = torch.zeros(8).masked_scatter(kept, value), None
    same(got[0], value)
    assert not got[1][mask].any() and (grad is None or torch.allclose(got[1][kept], grad, atol=1e-6))
    both = function(x, t, ignore_index=mask, sample_weight=s, **options)
    same(both, function(x, t, sample_weight=s * kept, **options))


def test_options_beside_several():
    x, t = data()
    mask, s, w = torch.isin(t, torch.tensor([2, 4])), torch.rand(8), torch.rand(5)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "return_lse": True, "sample_weight": s, "weight": w}
    expected = L.cross_entropy(x, torch.where(mask, -100, t), **options)
    same(L.cross_entropy(x, t, ignore_index=[2, 4], **options), expected)
    same(L.cross_entropy(x, t, ignore_index=mask, **options), expected)
    everything = torch.ones(8, dtype=torch.bool)
    assert L.cross_entropy(x, t, ignore_index=everything, all_ignored="zero") == 0
    assert L.cross_entropy(x, t, ignore_index=everything).isnan()
    same(L.cross_entropy(x[0], t[0], ignore_index=torch.tensor(False)), L.cross_entropy(x[0], t[0]))


DEEP = pytest.mark.deep("other losses by the same route as one that ran, with ignored rows and elements")


@needs_extension
@pytest.mark.parametrize("name", ["cross_entropy", *(pytest.param(name, marks=DEEP) for name in [*FUNCTIONS][1:])])
@pytest.mark.parametrize("what", ["several", "mask"])
def test_a_compiled_call_keeps_the_op(name, what):
    function, _ = FUNCTIONS[name]
    x, t = data()
    mask = t == 4
    if what == "several":
        run, ops = compiled_with_ops(lambda x, mask: function(x, t, ignore_index=[4, 2]))
        expected = value_and_grads(lambda x: function(x, t, ignore_index=[4, 2]), x)
    else:
        run, ops = compiled_with_ops(lambda x, mask: function(x, t, ignore_index=mask))
        expected = value_and_grads(lambda x: function(x, t, ignore_index=mask), x)
    same(value_and_grads(lambda x: run(x, mask), x), expected)
    assert holds(ops, name.removesuffix("_loss"))


@each_function
def test_what_is_no_index_is_refused(name):
    function, module = FUNCTIONS[name]
    x, t = data()
    for several, found in (([0, True], "bool"), ([0, 1.5], "float"), (["0"], "str"), ((None,), "NoneType")):
        with pytest.raises(TypeError, match=f"argument 'ignore_index' must hold ints, got {found}"):
            function(x, t, ignore_index=several)
    for mask in (torch.ones(7, dtype=torch.bool), torch.tensor(True), torch.ones(8, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"a mask of ignored rows must be of their shape \(8,\), got shape"):
            function(x, t, ignore_index=mask)
    for alone in ("0", 1.5, True):
        torchs = F.cross_entropy if name == "cross_entropy" else F.nll_loss
        ours, expected = (warned(lambda: f(x, t, ignore_index=alone))[0] for f in (function, torchs))  # noqa: B023
        assert ours[0] == expected[0]
    for refused in ([1, 2], torch.ones(8, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="TorchScript takes an int for the ignore_index"):
            torch.jit.script(module(ignore_index=refused))
    torch.jit.script(module(ignore_index=3))


def test_several_indices_beside_probabilities_are_refused_as_one_is():
    x, t = data()[0], torch.rand(8, 5).softmax(1)
    for one, several in ((1, [-100, 1]), (0, (0, -1))):
        run = lambda index: warned(lambda: L.cross_entropy(x, t, ignore_index=index))[0]  # noqa: E731
        assert run(one) == run(several)
    same(L.cross_entropy(x, t, ignore_index=[-100, -2]), L.cross_entropy(x, t))


# ---- elements


BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any], type[torch.nn.Module]]] = {
    "logits": (L.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, fusedloss.BCEWithLogitsLoss),
    "probabilities": (L.binary_cross_entropy, F.binary_cross_entropy, fusedloss.BCELoss),
}
each_binary = pytest.mark.parametrize("of", BINARY)


def elements(of: str, dtype: torch.dtype, missing: float) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, t = 3 * torch.randn(12, 7, dtype=torch.float64), torch.rand(12, 7, dtype=torch.float64)
    x = (x.sigmoid().clamp(0.01, 0.99) if of == "probabilities" else x).to(dtype)  # gradients within float16
    t[torch.rand(12, 7) < 0.3] = missing
    x.view(-1)[torch.nonzero(t.view(-1) == missing)[::3, 0]] = NAN
    return x, t.to(dtype), t != missing


@pytest.mark.thinned(1, deep=2)
@pytest.mark.parametrize("weighted", ["", "weight", "one of each class", "pos_weight"])
@pytest.mark.parametrize("missing", [-100, -1, 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_binary
def test_elements_are_ignored_as_if_they_were_not_there(of, dtype, reduction, missing, weighted):
    ours, torchs, module = BINARY[of]
    x, t, kept = elements(of, dtype, missing)
    options: dict[str, Any] = {}
    picked: dict[str, Any] = {}
    if weighted == "pos_weight" and of == "logits":
        options, picked = {"pos_weight": torch.rand(7).to(dtype)}, {}
        picked["pos_weight"] = options["pos_weight"].double().expand(12, 7)[kept]
    elif weighted:
        shape = (7,) if weighted == "one of each class" else (12, 7)
        options, picked = {"weight": (torch.rand(shape) + 0.5).to(dtype)}, {}
        picked["weight"] = options["weight"].double().expand(12, 7)[kept]
        if shape == (12, 7):
            options["weight"][~kept] = NAN
    value, grad = value_and_grads(lambda x: ours(x, t, reduction=reduction, ignore_index=missing, **options), x)
    assert value.dtype == dtype and grad.dtype == dtype and not grad[~kept].any()
    if reduction == "none":
        assert not value[~kept].any()
        value = value[kept]
    leaf = x.double()[kept].requires_grad_()
    exact = torchs(leaf, t.double()[kept], reduction=reduction, **picked)
    upstream = upstream_of(ours(x, t, reduction=reduction, ignore_index=missing, **options)).double()
    (exact_grad,) = torch.autograd.grad(exact, leaf, upstream[kept] if reduction == "none" else upstream)
    assert_close(value, exact.detach(), 16)
    assert_close(grad[kept], exact_grad, 16)
    assert torch.equal(
        module(reduction=reduction, ignore_index=missing, **options)(x, t),
        ours(x, t, reduction=reduction, ignore_index=missing, **options),
    )


@each_binary
def test_nothing_is_left_of_elements(of):
    ours = BINARY[of][0]
    x, t = torch.full((3, 4), NAN), torch.full((3, 4), -1.0)
    assert ours(x, t, ignore_index=-1).isnan() and ours(x, t, ignore_index=-1, reduction="sum") == 0
    value, grad = value_and_grads(lambda x: ours(x, t, ignore_index=-1, reduction="none"), x)
    assert not value.any() and not grad.any()
    assert not value_and_grads(lambda x: ours(x, t, ignore_index=-1, reduction="sum"), x)[1].any()


def test_a_mean_of_half_precision_elements_is_rounded_once():
    for dtype in HALVES:
        x, t = torch.full((300, 300), 40.0, dtype=dtype), torch.zeros(300, 300, dtype=dtype)
        t[0] = -1
        assert L.binary_cross_entropy_with_logits(x, t, ignore_index=-1) == 40.0  # their sum is beyond float16
        wide = L.binary_cross_entropy_with_logits(x, t.float(), ignore_index=-1)
        assert wide == 40.0 and wide.dtype == torch.float32
        with autocast(torch.bfloat16):
            assert L.binary_cross_entropy_with_logits(x, t, ignore_index=-1).dtype == torch.float32


@each_binary
def test_derivatives_of_elements(of):
    ours, torchs, _ = BINARY[of]
    x, t, kept = elements(of, torch.float64, -1)
    x = torch.where(x.isnan(), 0.5, x if of == "logits" else x.clamp(0.1, 0.9))[:4, :3].contiguous()
    t, kept = t[:4, :3].contiguous(), kept[:4, :3]
    for reduction in ("mean", "none"):
        run = lambda x, t: ours(x, t, reduction=reduction, ignore_index=-1)  # noqa: B023, E731
        assert torch.autograd.gradcheck(lambda x: run(x, t), x.clone().requires_grad_())  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: run(x, t), x.clone().requires_grad_())  # noqa: B023
    run = lambda x: ours(x, t, ignore_index=-1)  # noqa: E731
    (expected,) = torch.autograd.grad(torchs(leaf := x.clone().requires_grad_(), t * kept, kept.double()), leaf)
    same(torch.func.grad(run)(x), expected * kept.numel() / kept.sum())
    both = torch.func.vmap(torch.func.grad(lambda x, t: ours(x, t, ignore_index=-1)))
    same(both(torch.stack([x, x]), torch.stack([t, t])), torch.func.grad(run)(x).expand(2, -1, -1))


@needs_extension
@pytest.mark.parametrize("of", ["logits", pytest.param("probabilities", marks=DEEP)])
def test_a_compiled_call_of_elements_keeps_the_op(of):
    ours = BINARY[of][0]
    x, t, _ = elements(of, torch.float32, -1)
    run, ops = compiled_with_ops(lambda x: ours(x, t, ignore_index=-1))
    same(value_and_grads(run, x), value_and_grads(lambda x: ours(x, t, ignore_index=-1), x))
    assert holds(ops, ours.__name__)
    assert fusedloss.explain(ours, x, t, ignore_index=-1).startswith("fused")


@each_binary
def test_elements_that_do_not_fit_are_refused(of):
    ours, torchs, _ = BINARY[of]
    x, t, _ = elements(of, torch.float32, -1)
    for short in (t[:3], t[:, :1]):
        got, expected = (warned(lambda: f(x, short, **o))[0] for f, o in ((ours, {"ignore_index": -1}), (torchs, {})))  # noqa: B023
        assert got == expected
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        ours(x.nan_to_num(0.5), t, reduction="avg", ignore_index=-1)
    for index in (True, 1.5, "1"):
        with pytest.raises(TypeError, match="argument 'ignore_index' must be int, not"):
            ours(x, t, ignore_index=index)
