"""The losses of margins and of distributions: torch's results, gradients, dtypes, strides, warnings and errors."""

import copy
import inspect
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import autocast, error, no_less_exact, outcome, same, upstream_of, value_and_grads, warned
from layouts import laid_out
from losses import DTYPES, HALVES
from margin_calls import (
    ALL,
    BROADCAST,
    CALLS,
    EVERY_DTYPE,
    EVERY_FUNCTION,
    MODULES,
    leaves_of,
    made,
    numbers,
    reductions,
)
from marks import needs_extension, not_under_a_default_device, on_cpu_alone
from observe import Recorder, compiled_with_ops
from pointwise_calls import IMAGE_LAYOUTS, PAIRS, assert_reduction_as_in_torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

pytestmark = pytest.mark.filterwarnings("ignore:reduction")


def value_and_leaves(call: str, run: Any, x: Tensor, t: Tensor) -> list[Tensor]:
    """The value and the gradients that torch gives."""
    if leaves_of(call) == 2:
        return value_and_grads(run, x, t)
    return value_and_grads(lambda x: run(x, t), x)


def fused(function: str, *tensors: Tensor, **options: Any) -> bool:
    return fusedloss.explain(getattr(L, function), *tensors, **options).startswith("fused")


# ---- values, dtypes


@EVERY_DTYPE
@ALL
def test_value_and_gradients_against_float64(call, dtype):
    function, tensors, options = made(call, (30, 7), dtype)
    double = {name: each.double() if isinstance(each, Tensor) else each for name, each in options.items()}
    for reduction in reductions(call):
        run = lambda f, x, t, o: getattr(f, function)(x, t, **o, reduction=reduction)  # noqa: B023, E731
        got = value_and_leaves(call, lambda x, t: run(L, x, t, options), *tensors)  # noqa: B023
        exact = value_and_leaves(call, lambda x, t: run(F, x, t, double), *(each.double() for each in tensors))  # noqa: B023
        assert all(each.dtype == dtype for each in got)
        twice = reduction == "batchmean" or (function.startswith("multilabel") and reduction != "mean")
        if dtype in HALVES and twice:  # a sum or mean that is rounded, and then a quotient or product
            same(got[0].double(), exact[0], rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
            got, exact = got[1:], exact[1:]
            same([each.double() for each in got], exact, rtol=0.02, atol=1e-3)
        else:
            no_less_exact(got, exact, dtype)


OTHERS = [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@ALL
def test_dtypes_of_result_and_gradients(call, dtype):
    for other in OTHERS:
        function, (x, t), options = made(call, (4, 3), dtype, other)
        for reduction, of_target in itertools.product(reductions(call), (False, True)):

            def run(functions, x=x, t=t, reduction=reduction, of_target=of_target):
                leaves = [x, t] if of_target and leaves_of(call) == 2 else [x]
                leaves = [each for each in leaves if each.is_floating_point()]
                copies = {id(each): each.clone().requires_grad_() for each in leaves}
                given = [copies.get(id(each), each) for each in (x, t)]
                try:
                    value = getattr(functions, function)(*given, **options, reduction=reduction)  # noqa: B023
                    grads = torch.autograd.grad(value.sum(), list(copies.values())) if copies else []
                    return [value.dtype, *(grad.dtype for grad in grads)]
                except Exception as error:
                    return [type(error), str(error)]

            assert run(L) == run(F), (other, reduction)


@needs_extension
@EVERY_DTYPE
@ALL
def test_dtypes_that_run_fused(call, dtype):
    for other in OTHERS:
        function, (x, t), options = made(call, (4, 3), dtype, other)
        promoted = torch.promote_types(dtype, other)
        integer = other in (torch.int64, torch.uint8)
        of_promoted = promoted == dtype or (dtype in HALVES and promoted == torch.float32)
        if "labels" in call:
            # A weight of the input's dtype widens nothing; a target is converted to the dtype of the result.
            expected = of_promoted and other not in (torch.bool, torch.complex64)
        elif call in ("hinge", "soft margin"):
            expected = other in DTYPES or integer
        else:
            expected = of_promoted and (other in DTYPES or (integer and "divergence" not in call))
        assert fused(function, x, t, **options, reduction="sum") == expected, other


@pytest.mark.parametrize("other", [torch.int64, torch.int8, torch.uint8], ids=str)
@EVERY_DTYPE
@pytest.mark.parametrize("call", [call for call in CALLS if "divergence" not in call])
def test_integer_targets(call, dtype, other):
    function, (x, t), options = made(call, (5, 4), dtype, other)
    if other == torch.uint8 and call == "soft margin":
        pytest.skip("torch's gradient is wrong: test_margin_edges.py")
    for target, reduction in itertools.product((t, t[:1].expand(5, 4)), ("mean", "none")):
        run = lambda f, x, t: getattr(f, function)(x, t, **options, reduction=reduction)  # noqa: B023, E731
        got = value_and_grads(lambda x: run(L, x, target), x)  # noqa: B023
        torchs = value_and_grads(lambda x: run(F, x, target), x)  # noqa: B023
        assert got[0].dtype == torchs[0].dtype
        same(got, torchs, **({"rtol": 0.05, "atol": 0.1} if dtype in HALVES else {"rtol": 1e-5, "atol": 1e-6}))


# ---- shapes, strides


@pytest.mark.parametrize("sizes", PAIRS, ids=str)
@pytest.mark.parametrize("call", BROADCAST)
def test_broadcasting(call, sizes):
    function, options = CALLS[call]
    given = options(sizes[0], torch.float64)
    x, t = numbers(call, *sizes)
    assert fusedloss._library.extension is None or fused(function, x, t, **given, reduction="sum")
    for reduction in reductions(call):
        run = lambda f: lambda x, t: getattr(f, function)(x, t, **given, reduction=reduction)  # noqa: B023, E731
        ours, torchs = (value_and_leaves(call, run(f), x, t) for f in (L, F))
        same(ours, torchs)


@pytest.mark.parametrize("sizes", [((2, 3), (3,)), ((3,), (2, 3)), ((2, 3), (2, 1)), ((2, 1), (1, 3))], ids=str)
@pytest.mark.parametrize("function", ["soft_margin_loss", "multilabel_soft_margin_loss"])
def test_broadcasting_that_runs_natively_is_torchs(function, sizes):
    x, t = numbers("labels", *sizes)
    for reduction in ("mean", "none"):
        ours, torchs = (
            warned(lambda: value_and_grads(lambda x: getattr(f, function)(x, t, reduction=reduction), x))[0]  # noqa: B023
            for f in (L, F)
        )
        same(ours, torchs) if isinstance(torchs, list) else None
        assert isinstance(torchs, list) or ours == torchs


@pytest.mark.parametrize("sizes", [((3,), (4,)), ((2, 3), (2,)), ((0,), (3,)), ((4, 1), (0,)), ((), (0,))], ids=str)
@ALL
def test_shapes_that_do_not_fit(call, sizes):
    function, options = CALLS[call]
    x, t = numbers(call, *sizes)
    ours, torchs = (
        warned(lambda: getattr(f, function)(x, t, **options(sizes[0], torch.float64)))[0]  # noqa: B023
        for f in (L, F)
    )
    same(ours, torchs) if isinstance(torchs, Tensor) else None
    assert isinstance(torchs, Tensor) or ours == torchs


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 4, 2)], ids=str)
@ALL
def test_no_dimensions_and_no_elements(call, shape):
    for dtype, reduction in itertools.product([torch.float32, torch.float16], reductions(call)):
        function, tensors, options = made(call, shape, dtype)
        ours, torchs = (
            warned(
                lambda: value_and_leaves(
                    call,
                    lambda x, t: getattr(f, function)(x, t, **options, reduction=reduction),  # noqa: B023
                    *tensors,  # noqa: B023
                )
            )[0]
            for f in (L, F)
        )
        if isinstance(torchs, tuple):
            assert ours == torchs
        else:
            same(ours, torchs, **({"rtol": 0.01, "atol": 0.002} if dtype in HALVES else {}))


# In torch a step before the last has given elements of their own to what stands first in the last one.
_FIRST_IS_COPIED = {"hinge": 1, "divergence": 1, "divergence, log target": 1, "counts": 0, "counts, full": 0}
_FIRST_IS_COPIED |= {"soft margin": 0}


@pytest.mark.parametrize("of_input", IMAGE_LAYOUTS)
@ALL
def test_layouts(call, of_input):
    function, tensors, options = made(call, (2, 3, 4, 5), torch.float64)
    for of_target, reduction in itertools.product(IMAGE_LAYOUTS, reductions(call)):
        x, t = laid_out(tensors[0], of_input), laid_out(tensors[1], of_target)
        results = []
        for f, given in ((L, (x, t)), (F, (x, t)), (L, (x.contiguous(), t.contiguous()))):
            leaves = [each.detach().requires_grad_() for each in given[: leaves_of(call)]]
            value = getattr(f, function)(*leaves, *given[len(leaves) :], **options, reduction=reduction)
            results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
        ours, torchs, contiguous = results
        same(ours, torchs)
        same(ours, contiguous)
        first = _FIRST_IS_COPIED.get(call)
        if first is None or (of_input, of_target)[first] != "expanded columns":
            assert ours[0].stride() == torchs[0].stride(), (of_target, reduction)


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")], ids=str)
@pytest.mark.parametrize("call", BROADCAST)
def test_strides_of_losses_that_broadcast(call, layouts):
    function, tensors, options = made(call, (2, 3, 4, 5), torch.float64)
    x, t = (laid_out(each, layout) for each, layout in zip(tensors, layouts, strict=True))
    for one, other in ((x, t[:, :1]), (x[:1], t), (x, t[0, 0, 0]), (x[:, :, :1], t[:, :, :, :1]), (x[0], t)):
        ours, torchs = (getattr(f, function)(one, other, **options, reduction="none") for f in (L, F))
        same(ours, torchs, check_stride=True)


# ---- gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_gradcheck_and_gradgradcheck(call, reduction):
    function, tensors, options = made(call, (2, 2), torch.float64)
    leaves = [each.requires_grad_(i < leaves_of(call)) for i, each in enumerate(tensors)]
    run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    assert gradcheck(run, leaves)
    if call != "hinge":  # whose gradient depends on neither
        assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("call", ["hinge", "soft margin"])
@not_under_a_default_device
def test_a_target_that_requires_a_gradient_is_torchs(call):
    function, (x, t), options = made(call, (3, 2), torch.float64)
    t.requires_grad_()

    def run(functions):
        value = getattr(functions, function)(x.clone().requires_grad_(), t, **options)
        return torch.autograd.grad(value, t, allow_unused=True)

    ours, torchs = (warned(lambda: run(f))[0] for f in (L, F))  # noqa: B023
    assert ours == torchs
    assert torchs == (None,) or "not differentiable with respect to argument 'target'" in torchs[1]


# ---- autocast


@needs_extension
@pytest.mark.parametrize("other", [None, torch.float32], ids=["half target", "float32 target"])
@pytest.mark.parametrize("call", [call for call in CALLS if "labels" not in call])
@on_cpu_alone("on a GPU a bfloat16 gradient is made in forward and rounded again by its upstream gradient")
def test_autocast_gives_float32_no_less_exact_than_torchs(call, other):
    for dtype, reduction in itertools.product(HALVES, reductions(call)):
        function, tensors, options = made(call, (40, 30), dtype, other)
        run = lambda f: lambda x, t: getattr(f, function)(x, t, **options, reduction=reduction)  # noqa: B023, E731
        exact = value_and_leaves(call, run(F), *(each.double() for each in tensors))
        with autocast(dtype), Recorder() as recorder:
            ours = value_and_leaves(call, run(L), *tensors)
            assert fused(function, *tensors, **options, reduction=reduction)
        assert not any("_to_copy" in op for op in recorder.seen)
        with autocast(dtype):
            torchs = value_and_leaves(call, run(F), *tensors)
        assert ours[0].dtype == torchs[0].dtype == torch.float32
        for got, of_torch, expected in zip(ours, torchs, exact, strict=True):
            assert got.dtype == of_torch.dtype
            hair = 8 * 2**-24 if got.dtype == torch.float32 else 0.01 * torch.finfo(dtype).eps
            assert error(got, expected) <= error(of_torch, expected) + hair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@ALL
def test_autocast_gives_torchs_dtypes(call, dtype):
    for other, reduction in itertools.product([None, torch.float64, torch.int64], reductions(call)):
        function, (x, t), options = made(call, (4, 3), dtype, other)
        run = lambda f: getattr(f, function)(x, t, **options, reduction=reduction)  # noqa: B023, E731
        with autocast(torch.bfloat16):
            assert outcome(lambda: run(L)) == outcome(lambda: run(F)), (other, reduction)  # noqa: B023


# ---- arguments


@pytest.mark.parametrize("size_average, reduce", [*itertools.product([None, True, False], repeat=2)][1:])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@EVERY_FUNCTION
@not_under_a_default_device
def test_size_average_and_reduce(function, size_average, reduce, reduction):
    call = next(call for call in CALLS if CALLS[call][0] == function)
    _, (x, t), _ = made(call, (3, 2), torch.float32)
    given = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    for of_module in (False, True):
        results = []
        for functions, modules in ((L, fusedloss), (F, nn)):

            def run(functions=functions, modules=modules, of_module=of_module):
                return (
                    getattr(modules, MODULES[function])(**given)(x, t)
                    if of_module
                    else getattr(functions, function)(x, t, **given)
                )

            value, caught = warned(run)
            results.append((value, [each[:2] for each in caught]))
        same(results[0][0], results[1][0])
        assert results[0][1] == results[1][1] and results[0][1][0][1].startswith("size_average and reduce args")


@pytest.mark.parametrize("reduction", ["foo", "elementwise_mean", "Mean", "batchmean", None, 1])
@ALL
@not_under_a_default_device
def test_unusual_reductions(call, reduction):
    function, tensors, options = made(call, (3, 2), torch.float32)
    assert_reduction_as_in_torch(function, MODULES[function], tensors, options, reduction)


@not_under_a_default_device
def test_the_mean_of_divergences_is_warned_of_once_and_where_it_is_called():
    x, t = numbers("divergence", (3, 2), (3, 2))
    for tensors in ((x, t), (x[:0], t[:0])):  # fused and native
        of = [warned(lambda: f.kl_div(*tensors))[1] for f in (L, F)]  # noqa: B023
        assert of[0] == of[1] and len(of[0]) == 1 and of[0][0][2] == __file__
    of = [[each[:2] for each in warned(lambda: f.KLDivLoss()(x, t))[1]] for f in (fusedloss, nn)]  # noqa: B023
    assert of[0] == of[1] and len(of[0]) == 1
    assert warned(lambda: L.kl_div(x, t, reduction="batchmean"))[1] == []


ODD = [1, True, "1", None, 1j, torch.tensor(0.5, device="cpu"), math.inf, -math.inf, math.nan, 0.0, -1.0, 1e30, 10**400]


@pytest.mark.parametrize("parameter", ODD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "call, name", [("hinge", "margin"), ("rates", "eps"), ("rates", "full"), ("rates", "log_input")]
)
@not_under_a_default_device
def test_parameters(call, name, parameter):
    function, (x, t), options = made(call, (3, 2), torch.float32)
    for reduction in ("mean", "none"):
        given = options | {name: parameter, "reduction": reduction}
        ours, torchs = (warned(lambda: getattr(f, function)(x, t, **given)) for f in (L, F))  # noqa: B023
        if isinstance(torchs[0], Tensor):
            same(ours, torchs)
        else:
            assert ours == torchs


@EVERY_FUNCTION
def test_what_is_no_tensor(function):
    for arguments in (([1.0], [2.0]), (torch.ones(2), [2.0]), (1.0, torch.ones(2))):
        ours, torchs = (outcome(lambda: getattr(f, function)(*arguments)) for f in (L, F))  # noqa: B023
        assert ours == torchs


@pytest.mark.parametrize("size", [(), (1,), (3,), (2, 1), (2, 3), (4,), (2,), (2, 2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_weights_of_labels(size, dtype):
    _, (x, t), _ = made("labels", (2, 3), torch.bfloat16)
    weight = (3 * torch.rand(size) + 1).to(dtype)
    for reduction in ("mean", "sum", "none"):
        run = lambda f: f.multilabel_soft_margin_loss(x, t, weight, reduction=reduction)  # noqa: B023, E731
        ours, torchs = (warned(lambda: run(f))[0] for f in (L, F))  # noqa: B023
        if isinstance(torchs, Tensor):
            same(ours, torchs, rtol=0.03, atol=0.01)
        else:
            assert ours == torchs


def test_a_weight_of_labels_that_requires_a_gradient():
    _, (x, t), options = made("labels, weight", (4, 3), torch.float64)
    same(*(value_and_grads(f.multilabel_soft_margin_loss, x, t, *options.values()) for f in (L, F)))


@EVERY_FUNCTION
def test_the_signature_is_torchs(function):
    ours, torchs = (inspect.signature(getattr(f, function)).parameters for f in (L, F))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in torchs.values()
    ]


# ---- modules

CONSTRUCTED: dict[str, tuple[str, Any]] = {
    "hinge": ("hinge", lambda of: of.HingeEmbeddingLoss()),
    "hinge, positional": ("hinge", lambda of: of.HingeEmbeddingLoss(2.0, None, None, "sum")),
    "soft margin": ("soft margin", lambda of: of.SoftMarginLoss(reduction="none")),
    "divergence": ("divergence", lambda of: of.KLDivLoss(reduction="batchmean")),
    "log target": ("divergence, log target", lambda of: of.KLDivLoss(None, None, "sum", True)),
    "counts": ("counts", lambda of: of.PoissonNLLLoss()),
    "rates": ("rates", lambda of: of.PoissonNLLLoss(False, True, None, 0.1)),
    "labels": ("labels", lambda of: of.MultiLabelSoftMarginLoss()),
    "labels, weight": ("labels", lambda of: of.MultiLabelSoftMarginLoss(torch.tensor([1.0, 2.0]), reduction="none")),
}


@pytest.mark.parametrize("name", CONSTRUCTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_is_torchs(name):
    call, make = CONSTRUCTED[name]
    ours, native = make(fusedloss), make(nn)
    assert isinstance(ours, type(native)) and type(ours).__name__ == type(native).__name__
    assert repr(ours) == repr(native) and set(vars(native)) == set(vars(ours))
    assert list(ours.state_dict()) == list(native.state_dict())
    _, tensors, _ = made(call, (3, 2), torch.float32)
    expected = value_and_leaves(call, native, *tensors)
    for each in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(each) is type(ours)
        same(value_and_leaves(call, each, *tensors), expected)
    same(torch.jit.script(ours)(*tensors), expected[0])
    for module in (ours, native):
        module.reduction = "foo"
    assert outcome(lambda: ours(*tensors)) == outcome(lambda: native(*tensors))


# ---- under torch.compile


@needs_extension
@pytest.mark.deep("every form of these losses compiled; compiled/ compiled one of each")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_compile_gives_eagers_results_and_keeps_the_op(call, reduction):
    function, tensors, options = made(call, (6, 5), torch.float32)
    run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    same(value_and_leaves(call, compiled, *tensors), value_and_leaves(call, run, *tensors))
    assert any(op.startswith("fusedloss.") for op in ops) == (call != "hinge" or tensors[0].is_cuda)
    x, t = (laid_out(each, layout) for each, layout in zip(tensors, ("transposed", "contiguous"), strict=True))
    same(compiled(x, t), run(x, t), check_stride=True)
