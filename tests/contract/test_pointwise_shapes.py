"""Shapes, strides and weights, broadcast or not: torch's results, warnings and errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import same, upstream_of, value_and_grads, warned
from layouts import laid_out
from losses import HALVES, REDUCTIONS
from marks import needs_extension, not_under_a_default_device, on_cpu_alone
from observe import Recorder, bytes_allocated
from pointwise_calls import (
    ALL,
    BINARY,
    BROADCASTING,
    EVERY_DTYPE,
    EVERY_HALF,
    EVERY_REDUCTION,
    FUNCTIONS,
    IMAGE_LAYOUTS,
    MODULES,
    OF_DIFFERENCE,
    OF_TORCH,
    OF_TWO_DTYPES,
    PAIRS,
    TORCHS,
    WEIGHTED,
    as_double,
    data,
    elements,
    fused,
    made,
    of_torch,
    random,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

# ---- shapes


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
@pytest.mark.parametrize("sizes", PAIRS, ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
@not_under_a_default_device
def test_broadcasting(function, sizes, module):
    of_dtypes = [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]
    for (dtype, other), reduction in itertools.product(of_dtypes, REDUCTIONS):
        x, t = random(*sizes[0], seed=1).to(dtype), random(*sizes[1], seed=2).to(other)
        results, all_warnings = [], []
        differentiates = dtype == other or function in OF_TWO_DTYPES
        for functions, modules in ((L, fusedloss), (F, nn)):
            if module:
                run = getattr(modules, MODULES[function])(reduction=reduction)
            else:
                run = lambda x, t: getattr(functions, function)(x, t, reduction=reduction)  # noqa: B023, E731
            result, caught = warned(lambda: value_and_grads(run, x, t) if differentiates else run(x, t))  # noqa: B023
            results.append(result)
            # Of a module, the file of its own forward is blamed.
            all_warnings.append([warning[: 2 if module else 3] for warning in caught])
        same(results[0], results[1], **({"rtol": 0.02, "atol": 0.01} if dtype in HALVES else {}))
        assert all_warnings[0] == all_warnings[1] and len(all_warnings[0]) == 1
        assert all_warnings[0][0][1].startswith(BROADCASTING)


@pytest.mark.parametrize("sizes", PAIRS, ids=str)
@pytest.mark.parametrize("function", WEIGHTED)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
@not_under_a_default_device
def test_broadcasting_beside_a_weight(function, sizes):
    # Which has the input's size, and broadcasts with it; a mean divides by the sum of it as it is given.
    x, t, weight = random(*sizes[0], seed=1), random(*sizes[1], seed=2), elements(sizes[0], torch.float64)
    for reduction in REDUCTIONS:
        ours, torchs = (value_and_grads(getattr(f, function), x, t, weight=weight, reduction=reduction) for f in (L, F))
        same(ours, torchs)


@needs_extension
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_broadcasting_runs_fused():
    for function, (one, other) in itertools.product(OF_DIFFERENCE, PAIRS):
        assert fused(function, torch.zeros(one, requires_grad=True), torch.zeros(other, requires_grad=True))


@pytest.mark.parametrize("function", WEIGHTED)
@not_under_a_default_device
def test_of_two_misfits_the_target_is_named_first(function):
    x, t, weight = random(3), random(4), random(2)
    ours, torchs = (warned(lambda: getattr(f, function)(x, t, weight=weight)) for f in (L, F))  # noqa: B023
    assert ours == torchs and torchs[0][0] is RuntimeError


MISFITS = [((3,), (4,)), ((2, 3), (2,)), ((2, 3), (2, 1)), ((2,), (2, 1)), ((0,), (3,)), ((4, 1), (0,))]


@pytest.mark.parametrize("sizes", MISFITS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@not_under_a_default_device
def test_shapes_that_do_not_fit(function, sizes):
    x, t = torch.rand(sizes[0]), torch.rand(sizes[1])
    ours, of_torch = warned(lambda: getattr(L, function)(x, t)), warned(lambda: getattr(F, function)(x, t))
    assert ours[1] == of_torch[1]
    if isinstance(of_torch[0], Tensor):
        same(ours[0], of_torch[0])
    else:
        assert ours[0] == of_torch[0]


@pytest.mark.parametrize(
    "size", [(), (1,), (3,), (1, 3), (2, 1), (2, 3), (4,), (2,), (1, 2, 3), (2, 2, 3), (0,)], ids=str
)
@pytest.mark.parametrize("factor", ["weight", "pos_weight"])
@not_under_a_default_device
def test_sizes_of_weights(factor, size):
    for function in [*WEIGHTED, *BINARY] if factor == "weight" else BINARY[1:]:
        x, t = data(function, (2, 3), torch.float64)
        options = {factor: elements(size, torch.float64)}
        ours, of_torch = (warned(lambda: getattr(f, function)(x, t, **options)) for f in (L, F))  # noqa: B023
        if isinstance(of_torch[0], Tensor):
            same(ours, of_torch)
        else:
            assert ours == of_torch
        if function in WEIGHTED and size != (2, 3):
            assert of_torch[0] == (ValueError, "Weights and input must have the same size.")


@TORCHS
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 4, 2)], ids=str)
def test_no_dimensions_and_no_elements(shape, call):
    for dtype, reduction in itertools.product([torch.float32, torch.float16], REDUCTIONS):
        function, tensors, options = made(call, shape, dtype)
        ours, torchs = (
            warned(lambda: value_and_grads(getattr(f, function), *tensors, **options, reduction=reduction))  # noqa: B023
            for f in (L, F)
        )
        assert ours[1] == torchs[1]
        same(ours[0], torchs[0], **({"rtol": 0.01, "atol": 0.001} if dtype in HALVES else {}))


# ---- strides


@pytest.mark.parametrize("of_input", IMAGE_LAYOUTS)
@pytest.mark.parametrize("call", [*OF_TORCH, "focal, weight"])
def test_layouts(call, of_input):
    function, tensors, options = made(call, (2, 3, 4, 5), torch.float64)
    for of_target, reduction in itertools.product(IMAGE_LAYOUTS, REDUCTIONS):
        x, t = laid_out(tensors[0], of_input), laid_out(tensors[1], of_target)
        results = []
        for run, given in (
            (getattr(L, function), (x, t)),
            (of_torch(function), (x, t)),
            (of_torch(function), (x.contiguous(), t.contiguous())),
        ):
            # Not clones, whose strides would be others.
            leaves = [each.detach().requires_grad_() for each in given[: 1 if "focal" in call else 2]]
            value = run(leaves[0], leaves[1] if leaves[1:] else given[1], **options, reduction=reduction)
            results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
        ours, torchs, contiguous = results
        same(ours, contiguous)
        if reduction == "none" and "focal" not in call:
            assert ours[0].stride() == torchs[0].stride(), of_target


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "channels_last")], ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_strides_of_losses_that_broadcast(function, layouts):
    x, t = (laid_out(random(2, 3, 4, 5, seed=i), layout) for i, layout in enumerate(layouts))
    for one, other in ((x, t[:, :1]), (x[:1], t), (x, t[0, 0, 0]), (x[:, :, :1], t[:, :, :, :1]), (x[0], t)):
        ours, torchs = (getattr(f, function)(one, other, reduction="none") for f in (L, F))
        same(ours, torchs, check_stride=True)


@pytest.mark.parametrize("dtype, other", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss", BINARY[1]])
def test_strides_of_losses_of_several_dtypes(function, dtype, other):
    x, t = data(function, (2, 3, 4, 5), dtype, other)
    for of_input, of_target in itertools.product(IMAGE_LAYOUTS, IMAGE_LAYOUTS):
        ours, torchs = (
            getattr(f, function)(laid_out(x, of_input), laid_out(t, of_target), reduction="none") for f in (L, F)
        )
        assert ours.stride() == torchs.stride() and ours.dtype == torchs.dtype


@needs_extension
@ALL
def test_a_gradient_lies_as_its_tensor_does(call):
    function, (x, t), options = made(call, (2, 3, 4, 5), torch.float32)
    for layout in ("contiguous", "channels_last", "inner transposed"):
        for reduction in REDUCTIONS:
            leaves = [laid_out(x, layout).detach().requires_grad_()]
            target = laid_out(t, layout).detach()
            if "focal" not in call:
                leaves.append(target.requires_grad_())
            value = getattr(L, function)(leaves[0], target, **options, reduction=reduction)
            for leaf, grad in zip(leaves, torch.autograd.grad(value.sum(), leaves), strict=True):
                assert grad.stride() == leaf.stride()


@pytest.mark.parametrize("dims", [6, 7, 9])
@ALL
def test_more_dimensions_than_a_kernel_counts(call, dims):
    # No two of them merge, because no two tensors have the same order.
    function, (x, t), options = made(call, (2, 3, *[2] * (dims - 2)), torch.float64)
    turned = lambda x: x.permute(*reversed(range(dims))).contiguous().permute(*reversed(range(dims)))  # noqa: E731
    other = lambda x: x.movedim(0, dims // 2).contiguous().movedim(dims // 2, 0)  # noqa: E731
    strange = {k: v.roll(1) if isinstance(v, Tensor) and v.dim() < dims else v for k, v in options.items()}
    for reduction in REDUCTIONS:
        leaf = turned(x).detach().requires_grad_()
        value = getattr(L, function)(leaf, other(t), **strange, reduction=reduction)
        got = [value.detach(), *torch.autograd.grad(value, leaf, upstream_of(value))]
        expected = value_and_grads(lambda x: of_torch(function)(x, t, **strange, reduction=reduction), x)  # noqa: B023
        same(got, expected)


# ---- weights


@pytest.mark.thinned
@EVERY_REDUCTION
@EVERY_DTYPE
@pytest.mark.parametrize("function", WEIGHTED)
def test_a_weight_of_elements(function, dtype, reduction):
    x, t = data(function, (40, 7), dtype)
    weight = elements((40, 7), dtype)
    value, of_input, of_target = value_and_grads(getattr(L, function), x, t, weight=weight, reduction=reduction)
    losses = getattr(F, function)(x.double(), t.double(), reduction="none") * weight.double()
    divisors = {"none": 1, "sum": 1, "mean": losses.numel() if function == "huber_loss" else weight.double().sum()}
    expected = (losses if reduction == "none" else losses.sum()) / divisors[reduction]
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps if dtype in HALVES else 1e-6, "atol": 1e-6}
    same(value.double(), expected, **tolerance)
    same(value, getattr(F, function)(x, t, weight=weight, reduction=reduction), rtol=0.05, atol=0.01)
    exact = value_and_grads(getattr(F, function), x.double(), t.double(), weight=weight.double(), reduction=reduction)
    for got, double in zip((value, of_input, of_target), exact, strict=True):
        same(got.double(), double, **tolerance)


@EVERY_HALF
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss"])
@not_under_a_default_device
def test_a_mean_by_weights_whose_sum_is_beyond_float16(function, dtype):
    x, t = (random(100_000, seed=i).to(dtype) for i in (1, 2))
    weight = elements((100_000,), dtype) + 3
    assert weight.double().sum() > 2 * torch.finfo(torch.float16).max
    value, of_input, of_target = value_and_grads(getattr(L, function), x, t, weight=weight)
    exact = value_and_grads(getattr(F, function), x.double(), t.double(), weight=weight.double())
    assert value.dtype == of_input.dtype == dtype
    eps = torch.finfo(dtype).eps
    same(value.double(), exact[0], rtol=eps, atol=0)
    # The smallest gradients of float16 are multiples of 6e-8.
    same(of_input.double(), exact[1], rtol=eps, atol=6e-8)
    same(of_target.double(), exact[2], rtol=eps, atol=6e-8)
    if dtype == torch.float16:
        assert not getattr(F, function)(x, t, weight=weight).isfinite()


@pytest.mark.parametrize("function", ["mse_loss", "l1_loss"])
@not_under_a_default_device
def test_a_mean_by_weights_that_are_zero_is_torchs(function):
    x, t = random(2, 5).unbind()
    for weight in (torch.zeros(5, dtype=torch.float64), torch.tensor([1.0, -1, 0, 0, 0], dtype=torch.float64)):
        ours, torchs = (value_and_grads(getattr(f, function), x, t, weight=weight) for f in (L, F))
        same(ours, torchs)


@EVERY_REDUCTION
@pytest.mark.parametrize("function", WEIGHTED)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_a_weight_that_requires_a_gradient(function, reduction):
    x, t, weight = random(4, 5, seed=1), random(4, 5, seed=2), elements((4, 5), torch.float64)
    for target in (t, t[0]):
        results = []
        for functions in (L, F):
            run = lambda x, t, w: getattr(functions, function)(x, t, reduction=reduction, weight=w)  # noqa: B023, E731
            results.append(value_and_grads(run, x, target, weight))
        same(*results)
    leaves = [each[:2].clone().requires_grad_() for each in (x, t, weight)]
    run = lambda x, t, w: getattr(L, function)(x, t, reduction=reduction, weight=w)  # noqa: E731
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("factor", ["weight", "pos_weight"])
def test_a_binary_weight_that_requires_a_gradient_is_torchs(factor):
    for function in BINARY if factor == "weight" else BINARY[1:]:
        x, t = data(function, (4, 3), torch.float64)
        weight = elements((3,), torch.float64).requires_grad_()
        for leaf in (x, x.clone().requires_grad_()):
            results = []
            for functions in (L, F):
                run = lambda: getattr(functions, function)(leaf, t, **{factor: weight})  # noqa: B023, E731
                try:
                    results.append([run().detach(), *torch.autograd.grad(run(), weight)])
                except RuntimeError as error:
                    results.append(str(error))
            assert results[0] == results[1] if isinstance(results[1], str) else same(*results) is None


POS_WEIGHTS = [(), (5,), (3, 1, 1), (1, 3, 1, 1), (2, 1, 1, 1), (4, 1), (2, 3, 4, 5)]


@pytest.mark.thinned
@pytest.mark.parametrize("size", POS_WEIGHTS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "inner transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_pos_weight_of_channels(dtype, layout, size):
    # (C, 1, 1) beside (N, C, H, W) is what segmentation has.
    x, t = (laid_out(each, layout) for each in data(BINARY[1], (2, 3, 4, 5), dtype))
    pos_weight = elements(size, dtype)
    for options in ({}, {"weight": elements((3, 1, 1), dtype)}):
        given = {"pos_weight": pos_weight, **options}
        for reduction in REDUCTIONS:
            got = value_and_grads(L.binary_cross_entropy_with_logits, x, t, **given, reduction=reduction)
            exact = value_and_grads(
                F.binary_cross_entropy_with_logits, x.double(), t.double(), **as_double(given), reduction=reduction
            )
            for one, other in zip(got, exact, strict=True):
                rtol = torch.finfo(dtype).eps if dtype in HALVES else 1e-6
                same(one.double(), other, rtol=rtol, atol=1e-6 if dtype not in HALVES else 1e-5)


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last",) * 2, ("channels_last", "contiguous")])
@pytest.mark.parametrize("dtype, other", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_a_pos_weight_of_channels_is_read_in_place(dtype, other, layouts):
    x, t = data(BINARY[1], (2, 21, 50, 40), dtype, other)
    x, t = laid_out(x, layouts[0]).requires_grad_(), laid_out(t, layouts[1])
    weight, pos_weight = elements((40,), torch.float32), elements((21, 1, 1), torch.float32)

    upstream = torch.tensor(0.75)

    def train() -> None:
        loss = L.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight)
        torch.autograd.grad(loss, x, upstream)

    with Recorder() as recorder:
        train()
    # Nothing of torch's but a look at the upstream gradient, and as the recorder holds what it saw, a copy of that.
    of_torch = {op for op in recorder.seen if not op.startswith("fusedloss.")}
    assert of_torch <= {"aten._local_scalar_dense.default", "aten.clone.default"}
    # The gradient alone: once in forward, and once more where a bfloat16 one is made again.
    gradients = 1 if dtype == torch.float32 else 2
    assert x.nbytes <= bytes_allocated(train) <= gradients * x.nbytes + 4096
    with torch.no_grad():
        assert bytes_allocated(lambda: L.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight)) < 4096


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
@pytest.mark.parametrize("dtype, other", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss"])
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_operands_that_broadcast_and_differ_in_dtype_are_read_in_place(function, dtype, other):
    x, t = random(2, 21, 50, 40).to(dtype).requires_grad_(), random(21, 1, 1).to(other)
    train = lambda: torch.autograd.grad(getattr(L, function)(x, t), x)  # noqa: E731
    assert x.nbytes <= bytes_allocated(train) <= x.nbytes + 4096
