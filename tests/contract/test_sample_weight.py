"""A weight of each row, beside plain PyTorch over the rows that count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import autocast, same, upstream_of, value_and_grads
from losses import DTYPES, ONE_OF_EACH, REDUCTIONS, SOFTMAX, each_of, traits
from marks import needs_extension, on_cpu_alone
from observe import compiled_with_ops, holds
from torch import Tensor
from weighted_calls import CALLS, FUSED, SHAPES, Call, check, data, each_call, each_fused, exact

import fusedloss
import fusedloss.functional as L
from fusedloss import _route


@pytest.mark.thinned(1, deep=2)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@each_call
def test_values_and_gradients_are_those_of_the_rows_that_count(call, shape, dtype, reduction, weighted):
    x, t, s = data(call, SHAPES[shape], dtype)
    if call.name == "nll":
        x = -x.abs()
    classes = x.shape[min(x.dim() - 1, 1)]
    w = torch.linspace(0.5, 1.5, classes).to(dtype) if weighted else None
    check(call, x, t, s, w, reduction)
    if call.op and fusedloss._library.extension:
        assert fusedloss.explain(call.loss, x, t, w, sample_weight=s).startswith("fused"), call.name


@each_fused
def test_the_native_formula_has_the_same_values_and_gradients(call):
    native = _route.LOSSES[call.op].native

    def loss(x: Tensor, t: Tensor, w: Tensor | None, reduction: str, sample_weight: Tensor) -> Any:
        return native(x, t, w, reduction, -100, *call.params, sample_weight=sample_weight)

    for weighted in (False, True):
        x, t, s = data(call, (30, 5), torch.float64)
        w = torch.linspace(0.5, 1.5, 5, dtype=torch.float64) if weighted else None
        for reduction in REDUCTIONS:
            check(Call(call.name, loss, call.of_rows, call.op, call.soft), x, t, s, w, reduction)


@needs_extension
@each_of([loss for loss in SOFTMAX if loss in ONE_OF_EACH])
def test_every_declared_loss_takes_weights(loss):
    x, t = loss.data((9, 5), torch.float64)
    w, s = torch.rand(5).double() + 0.5, torch.rand(9).double()
    s[3] = 0
    declared = _route.LOSSES[loss.op]
    weight = None if loss.op == "log_probs" else w
    for reduction in REDUCTIONS:
        run = lambda each, x: each(x, t, weight, reduction, -100, *loss.params, sample_weight=s)  # noqa: B023, E731
        assert "fused" in fusedloss.explain(run, declared.routed, x)
        expected = value_and_grads(lambda x: run(declared.native, x), x)  # noqa: B023
        same(value_and_grads(lambda x: run(declared.routed, x), x), expected)  # noqa: B023


@pytest.mark.thinned(1, deep=2)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["few classes", "rows", "classes apart", "long rows"])
@pytest.mark.parametrize("call", [call for call in FUSED if "cross_entropy" in (call.op or "")], ids=lambda c: c.name)
def test_wherever_the_gradient_is_made(call, shape, dtype, grad_in_forward, inplace):
    x, t, s = data(call, SHAPES[shape], dtype)
    call = Call(call.name, lambda x, *a, **o: call_loss(x * 1, *a, **o), call.of_rows, call.op, call.soft)
    call_loss = next(other.loss for other in CALLS if other.name == call.name)
    for reduction in ("mean", "sum"):
        check(call, x, t, s, None, reduction, grad_in_forward=grad_in_forward, inplace=inplace)


ENTROPY, PROBABILITIES = CALLS[2], CALLS[4]
FINITE = pytest.mark.parametrize("call", [ENTROPY, PROBABILITIES], ids=lambda call: call.name)


def finite(call: Call, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x, t, s = data(call, shape, dtype)
    return x.nan_to_num(1.0, 2.0, -2.0), t, s.to(dtype)


@pytest.mark.parametrize("shape", ["few classes", "rows", "classes apart", "long rows"])
@FINITE
def test_the_lse_has_no_weight(call, shape):
    x, t, s = finite(call, SHAPES[shape])
    run = lambda x: call.loss(x, t, sample_weight=s, return_lse=True)  # noqa: E731
    expected = lambda x: (  # noqa: E731
        exact(call, x, t, s, None, "mean"),
        (5.0 * (x / 5.0).tanh()).logsumexp(1),
    )
    results = []
    for each in (run, expected):
        leaf = x.clone().requires_grad_()
        loss, lse = each(leaf)
        grad = torch.autograd.grad([loss, lse], leaf, [torch.ones_like(loss), upstream_of(lse)])[0]
        results.append((loss.detach(), lse.detach(), grad))
    same(results[0], results[1])


@pytest.mark.parametrize("all_ignored", ["nan", "zero"])
@FINITE
def test_a_mean_over_rows_of_weight_0(call, all_ignored):
    for inplace in (False, True):
        x, t, s = data(call, (9, 5), torch.float32)
        leaf = x.requires_grad_()
        value = call.loss(leaf * 1, t, sample_weight=s * 0, all_ignored=all_ignored, inplace=inplace)
        assert value.isnan() if all_ignored == "nan" else value == 0
        assert not torch.autograd.grad(value, leaf, create_graph=not inplace)[0].any()


@pytest.mark.parametrize("of_weight", DTYPES, ids=str)
@each_fused
def test_weights_of_any_dtype_change_no_dtype_of_the_result(call, of_weight):
    for dtype in (torch.float32, torch.bfloat16):
        x, t, s = data(call, (30, 5), dtype)
        s = s.to(of_weight)
        value = call.loss(x, t, sample_weight=s)
        assert value.dtype == dtype
        same(value.double(), exact(call, x.double(), t, s, None, "mean"), rtol=1e-2, atol=1e-3)
        with autocast(torch.bfloat16):
            wide = call.loss(x, t, sample_weight=s)
        assert wide.dtype == torch.float32
        same(wide.double(), exact(call, x.double(), t, s, None, "mean"), rtol=1e-5, atol=1e-6)
    if "cross_entropy" in (call.op or ""):
        assert call.loss(x, t, sample_weight=s, out_dtype=torch.float32).dtype == torch.float32
        assert call.loss(x, t, sample_weight=s, out_dtype=torch.float64).dtype == torch.float64


def test_weights_are_read_whatever_their_strides():
    call = CALLS[0]
    x, t, s = data(call, (6, 5, 4), torch.float32)
    expected = call.loss(x, t, sample_weight=s, reduction="none")
    for laid_out in (s.t().contiguous().t(), torch.stack([s, s], -1)[..., 1]):
        assert torch.equal(call.loss(x, t, sample_weight=laid_out, reduction="none"), expected)
    one = torch.tensor(0.5).expand(6, 4)
    x = x.nan_to_num(0.0, 0.0, 0.0)
    same(call.loss(x, t, sample_weight=one, reduction="sum"), 0.5 * call.loss(x, t, reduction="sum"))


OTHERS_DEEP = "other losses by the same route as one that ran, with weights of rows"


def one_and(others: list[Call]) -> pytest.MarkDecorator:
    """Over the z-loss and softcap of cross-entropy, and with --deep over others."""
    deep = [pytest.param(call, marks=pytest.mark.deep(OTHERS_DEEP)) for call in others]
    return pytest.mark.parametrize("call", [ENTROPY, *deep], ids=lambda call: call.name)


# ---- derivatives


@one_and([call for call in CALLS if call is not ENTROPY])
def test_derivatives_of_every_order(call):
    x, t, s = finite(call, (4, 3))
    if call.name == "nll":
        x = -x.abs()
    run = lambda x: call.loss(x, t, sample_weight=s)  # noqa: E731
    assert torch.autograd.gradcheck(run, x.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(run, x.clone().requires_grad_())
    both = lambda x, s: call.loss(x, t, sample_weight=s)  # noqa: E731
    leaves = (x.clone().requires_grad_(), s.clone().requires_grad_())
    assert torch.autograd.gradcheck(both, leaves) and torch.autograd.gradgradcheck(both, leaves)


@each_fused
def test_weights_that_require_a_gradient_run_natively(call):
    x, t, s = data(call, (9, 5), torch.float32)
    told = fusedloss.explain(call.loss, x, t, sample_weight=s.requires_grad_())
    assert not fusedloss._library.extension or told == "native: the sample_weight requires a gradient"
    value, of_x, of_s = value_and_grads(lambda x, s: call.loss(x, t, sample_weight=s), x, s)
    same(value.double(), exact(call, x.double(), t, s.detach(), None, "mean"), rtol=1e-5, atol=1e-6)
    assert of_x.isfinite().all() and of_s.isfinite().all()  # of rows of weight 0 whose logits are no numbers too


@pytest.mark.parametrize("call", [CALLS[1], PROBABILITIES, *CALLS[5:]], ids=lambda call: call.name)
def test_transforms_of_torch_func(call):
    x, t, s = finite(call, (3, 3))
    run = lambda x, s: call.loss(x, t, sample_weight=s)  # noqa: E731
    expected = value_and_grads(lambda x: exact(call, x, t, s, None, "mean"), x)[1]
    scale = upstream_of(torch.ones(()).double())
    same(torch.func.grad(run)(x, s) * scale, expected)
    both = torch.func.vmap(torch.func.grad(run))(torch.stack([x, x]), torch.stack([s, 2 * s]))
    same(both * scale, torch.stack([expected, expected]))


@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_weights_that_are_overwritten_before_backward(grad_in_forward):
    x, t, s = data(CALLS[0], (9, 5), torch.float32)
    leaf = x.requires_grad_()
    loss = L.cross_entropy(leaf, t, sample_weight=s, grad_in_forward=grad_in_forward)
    expected = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    s.zero_()
    if fusedloss._library.extension:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert expected.any()


# ---- captured


@needs_extension
@one_and([PROBABILITIES, CALLS[5]])
def test_a_compiled_call_keeps_the_op(call):
    x, t, s = data(call, (30, 5), torch.float32)
    run, ops = compiled_with_ops(lambda x, t, s: call.loss(x, t, sample_weight=s))
    for each in (s, s + 1):
        got = value_and_grads(lambda x: run(x, t, each), x)  # noqa: B023
        same(got, value_and_grads(lambda x: call.loss(x, t, sample_weight=each), x))  # noqa: B023
    assert holds(ops, call.op)


class Module(torch.nn.Module):
    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Any:
        return self.loss(x, t, sample_weight=s)


@pytest.mark.deep("exports and decompositions of weights of rows; compiled calls, which capture the same op, ran")
@needs_extension
@pytest.mark.parametrize("call", [ENTROPY, PROBABILITIES, CALLS[5], CALLS[6]], ids=lambda call: call.name)
def test_an_exported_call_keeps_the_op_and_decomposes(call):
    module, (x, t, s) = Module(call.loss), data(call, (30, 5), torch.float32)
    program = torch.export.export(module, (x, t, s))
    assert f"fusedloss.{call.op}.default" in [str(node.target) for node in program.graph.nodes]
    decomposed = program.run_decompositions()
    assert not any("fusedloss" in str(node.target) for node in decomposed.graph.nodes)
    same(decomposed.module()(x, t, s), module(x, t, s))


@pytest.mark.deep("opcheck of weights of rows; compiled calls ran, and opcheck without weights")
@needs_extension
@pytest.mark.parametrize("call", [ENTROPY, CALLS[3], CALLS[5]], ids=lambda call: call.name)
def test_the_raw_ops(call):
    x, t, s = data(call, (6, 5), torch.float64)
    x = x.nan_to_num(1.0, 2.0, -2.0)
    ops, params = torch.ops.fusedloss, [0.1, 1e-2, 5.0] if "cross" in call.op else []
    if traits(call.op).reads_row:
        torch.library.opcheck(getattr(ops, f"{call.op}_with_grad").default, (x, t, None, 1, -100, params, False, s))
        torch.library.opcheck(getattr(ops, f"{call.op}_with_grad_").default, (x, t, None, 1, -100, params, False, s))
    forward = getattr(ops, call.op).default
    *_, statistics = forward(x, t, None, 1, -100, params, False, False, s)
    backward = (torch.ones((), dtype=x.dtype), None, x, t, None, statistics, 1, -100, params, s)
    torch.library.opcheck(getattr(ops, f"{call.op}_backward").default, backward)
    torch.library.opcheck(getattr(ops, f"{call.op}_backward_").default, backward)
    torch.library.opcheck(forward, (x.requires_grad_(), t, None, 1, -100, params, False, False, s))


@needs_extension
def test_the_raw_op_refuses_what_the_kernels_do_not_own():
    x, t = torch.randn(4, 5), torch.arange(4)
    for s, message in (
        (torch.ones(3), "the sample_weight does not fit the rows"),
        (torch.ones(4, dtype=torch.int64), "the sample_weight is no float64"),
        (torch.ones(4, requires_grad=True), "the sample_weight requires a gradient"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fusedloss.cross_entropy(x, t, None, 1, -100, [], False, False, s)


# ---- what is refused


REFUSED = {
    "one for all": (lambda: torch.ones(()), ValueError, r"shape \(4,\), got shape \(\)"),
    "too few": (lambda: torch.ones(3), ValueError, r"shape \(4,\), got shape \(3,\)"),
    "one for each logit": (lambda: torch.ones(4, 5), ValueError, r"shape \(4,\), got shape \(4, 5\)"),
    "integers": (lambda: torch.ones(4, dtype=torch.int64), ValueError, "floating point dtype, got torch.int64"),
    "bools": (lambda: torch.ones(4, dtype=torch.bool), ValueError, "floating point dtype, got torch.bool"),
    "another device": (lambda: torch.ones(4, device="meta"), ValueError, "input's device .*, got meta"),
    "a list": (lambda: [1.0] * 4, TypeError, "sample_weight must be a Tensor, not list"),
    "a number": (lambda: 0.5, TypeError, "sample_weight must be a Tensor, not float"),
}


@pytest.mark.parametrize("case", REFUSED)
@each_call
def test_weights_that_do_not_fit_are_refused(call, case):
    make, kind, message = REFUSED[case]
    x, t, _ = data(call, (4, 5), torch.float32)
    with pytest.raises(kind, match=message):
        call.loss(x, t, sample_weight=make())


@each_call
def test_a_target_that_does_not_fit_is_refused_in_torchs_words(call):
    x, t, s = data(call, (4, 5), torch.float32)
    refused = []
    for options in ({}, {"sample_weight": s}):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call.loss(x, t[:3], **options)
        refused.append((caught.type, str(caught.value)))
    assert refused[0] == refused[1]


@on_cpu_alone("a GPU raises later; the tests of its kernels see the bad target")
def test_a_bad_target_is_refused_whatever_its_weight():
    with pytest.raises(IndexError, match="out of bounds"):
        L.cross_entropy(torch.randn(2, 3), torch.tensor([0, 7]), sample_weight=torch.tensor([1.0, 0.0]))


@needs_extension
@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_logits_are_not_overwritten_by_a_gradient_that_reads_them_as_weights(grad_in_forward):
    x, t = torch.rand(4, 5, requires_grad=True) * 1, torch.arange(4)
    options = {"inplace": True, "grad_in_forward": grad_in_forward}
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        L.cross_entropy(x, t, sample_weight=x.detach().view(-1)[:4], **options)
    strided = x.detach()[:, 0]  # copied before anything is written
    expected = torch.autograd.grad(L.cross_entropy(x, t, sample_weight=strided.clone()), x)
    same(torch.autograd.grad(L.cross_entropy(x, t, sample_weight=strided, **options), x), expected)


# ---- modules


@pytest.mark.parametrize("make", [fusedloss.CrossEntropyLoss, fusedloss.NLLLoss, fusedloss.FocalLoss])
def test_a_module_takes_weights_at_each_call(make):
    x, t, s = torch.randn(6, 5), torch.arange(6) % 5, torch.rand(6)
    module = make()
    function = {"CrossEntropyLoss": L.cross_entropy, "NLLLoss": L.nll_loss}.get(make.__name__, L.focal_loss)
    expected = function(x, t, sample_weight=s)
    assert torch.equal(module(x, t, s), expected) and torch.equal(module(x, t, sample_weight=s), expected)
    assert torch.equal(module(x, t), function(x, t))
    traced = torch.fx.symbolic_trace(module)
    assert torch.equal(traced(x, t, s), expected) and torch.equal(traced(x, t), function(x, t))
    same(torch.jit.script(module)(x, t), function(x, t))


def test_a_scripted_focal_loss_takes_no_weights():
    x, t = torch.randn(6, 5), torch.arange(6) % 5
    with pytest.raises(torch.jit.Error, match="takes no sample_weight"):
        torch.jit.script(fusedloss.FocalLoss())(x, t, torch.ones(6))
