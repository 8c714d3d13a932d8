"""The pointwise losses as drop-ins: what torch.nn's take, give, keep, warn of and refuse, theirs do too.

test_pointwise_accuracy.py has the numbers of random calls.
"""

import copy
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, REDUCTIONS, Recorder, needs_extension, on_cpu_alone
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fusedloss
import fusedloss.functional as L

BROADCASTING = "Using a target size"  # torch warns of it, and so do we
HALVES = [torch.bfloat16, torch.float16]
OF_DIFFERENCE = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"]
WEIGHTED = ["mse_loss", "l1_loss", "huber_loss"]
BINARY = ["binary_cross_entropy", "binary_cross_entropy_with_logits"]
FUNCTIONS = OF_DIFFERENCE + BINARY
MODULES = {
    "mse_loss": "MSELoss",
    "l1_loss": "L1Loss",
    "smooth_l1_loss": "SmoothL1Loss",
    "huber_loss": "HuberLoss",
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return made.to(torch.get_default_device())


def data(function: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype | None = None) -> list[Tensor]:
    """An input and a target, of another dtype where one is given."""
    x, t = 2 * random(*shape, seed=1), random(*shape, seed=2)
    x = x.sigmoid() if function == "binary_cross_entropy" else x
    t = t.sigmoid() if function in BINARY else t
    return [x.to(dtype), t.to(dtype if other is None else other)]


# What a call is given beside input and target, from their shape: the losses with all that their kernels take.
Options = Callable[[tuple[int, ...], torch.dtype], dict[str, Any]]


def elements(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 3) -> Tensor:
    return (random(*shape, seed=seed).abs() + 0.1).to(dtype)


def of_classes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 4) -> Tensor:
    """Of the second dimension, as a pos_weight of (N, C, H, W) is."""
    return elements((shape[1], *[1] * len(shape[2:])) if len(shape) > 1 else shape, dtype, seed)


CALLS: dict[str, tuple[str, Options]] = {
    "mse": ("mse_loss", lambda shape, dtype: {}),
    "mse, weight": ("mse_loss", lambda shape, dtype: {"weight": elements(shape, dtype)}),
    "l1": ("l1_loss", lambda shape, dtype: {}),
    "l1, weight": ("l1_loss", lambda shape, dtype: {"weight": elements(shape, dtype)}),
    "smooth l1": ("smooth_l1_loss", lambda shape, dtype: {"beta": 0.7}),
    "huber": ("huber_loss", lambda shape, dtype: {"delta": 0.7}),
    "huber, weight": ("huber_loss", lambda shape, dtype: {"delta": 0.7, "weight": elements(shape, dtype)}),
    "bce": ("binary_cross_entropy", lambda shape, dtype: {}),
    "bce, weight": ("binary_cross_entropy", lambda shape, dtype: {"weight": elements(shape[-1:], dtype)}),
    "logits": ("binary_cross_entropy_with_logits", lambda shape, dtype: {}),
    "logits, weight": (
        "binary_cross_entropy_with_logits",
        lambda shape, dtype: {"weight": elements(shape[-1:], dtype)},
    ),
    "logits, pos_weight": (
        "binary_cross_entropy_with_logits",
        lambda shape, dtype: {"pos_weight": of_classes(shape, dtype)},
    ),
    "logits, both": (
        "binary_cross_entropy_with_logits",
        lambda shape, dtype: {"weight": elements(shape, dtype), "pos_weight": of_classes(shape, dtype)},
    ),
    "focal": ("sigmoid_focal_loss", lambda shape, dtype: {"alpha": 0.3, "gamma": 1.5}),
    "focal, weight": (
        "sigmoid_focal_loss",
        lambda shape, dtype: {"gamma": 2.0, "weight": elements(shape[-1:], dtype)},
    ),
}
ALL = pytest.mark.parametrize("call", CALLS)
OF_TORCH = [call for call in CALLS if "focal" not in call]
TORCHS = pytest.mark.parametrize("call", OF_TORCH)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EVERY_HALF = pytest.mark.parametrize("dtype", HALVES, ids=str)


def made(
    call: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype | None = None
) -> tuple[str, list[Tensor], dict[str, Any]]:
    function, options = CALLS[call]
    return function, data(function if "focal" not in call else BINARY[1], shape, dtype, other), options(shape, dtype)


def of_torch(function: str) -> Callable[..., Tensor]:
    """The function that ours stands for; of the focal loss, which torch lacks, its formula."""
    if function != "sigmoid_focal_loss":
        return getattr(F, function)

    def focal(x, t, alpha=0.25, gamma=2.0, reduction="none", weight=None):
        return fusedloss._route.LOSSES["sigmoid_focal"].native(x, t, weight, reduction, alpha, gamma)

    return focal


def as_double(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}


def upstream_of(value: Tensor) -> Tensor:
    """Random, never ones, and exact in every dtype."""
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = torch.randint(5, 12, value.shape, generator=generator, device="cpu") / 8
    return drawn.to(value.device, value.dtype)


def value_and_grads(run: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> list[Tensor]:
    """The value, and the gradients of the tensors."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    value = run(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))]


def same(got: Any, expected: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


def no_less_exact(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Than one rounding of a half type, or a few of a wider one."""
    eps = torch.finfo(dtype).eps
    for one, other in zip(got, exact, strict=True):
        scale = other.abs().nan_to_num(0, 0, 0).max().item() if other.numel() else 0.0
        steps = 1 if dtype in HALVES else 32
        same(one.double(), other, rtol=steps * eps, atol=steps * eps * scale / 16)


def warned(run: Callable[[], Any]) -> tuple[Any, list[tuple[type, str, str]]]:
    """What it returns or raises, as text; and what it warns of, with the file that is blamed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = run()
        except Exception as error:
            result = (type(error), str(error))
    return result, [(warning.category, str(warning.message), warning.filename) for warning in caught]


def outcome(run: Callable[[], Tensor]) -> Any:
    """A dtype, or an error with its text."""
    result, _ = warned(run)
    return result.dtype if isinstance(result, Tensor) else result


def fused(function: str, *tensors: Tensor, **options: Any) -> bool:
    return fusedloss.explain(getattr(L, function), *tensors, **options).startswith("fused")


# ---- dtypes

OTHERS = [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_of_result_and_gradients(function, dtype):
    def forward_and_backward(functions: Any, x: Tensor, t: Tensor, reduction: str) -> list[Any]:
        run = lambda: getattr(functions, function)(x, t, reduction=reduction)  # noqa: E731
        leaves = [each for each in (x, t) if each.is_floating_point()]
        forward = outcome(run)
        for each in leaves:
            each.requires_grad_()
        try:
            value = run()
            backward = [value.dtype, *(grad.dtype for grad in torch.autograd.grad(value.sum(), leaves))]
        except Exception as error:
            backward = [type(error), str(error)]
        return [forward, *backward]

    for other, reduction in itertools.product(OTHERS, REDUCTIONS):
        ours, torchs = (
            forward_and_backward(functions, *data(function, (4, 3), dtype, other), reduction) for functions in (L, F)
        )
        assert ours == torchs, (other, reduction)


@needs_extension
@EVERY_DTYPE
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_that_run_fused(function, dtype):
    # A result of the input's dtype, or of float32 beside a half-precision one.
    for other in OTHERS:
        result = torch.promote_types(dtype, other)
        if function in ("huber_loss", "binary_cross_entropy"):
            expected = other == dtype
        elif function in OF_DIFFERENCE:
            takes = other in (*DTYPES, torch.int64, torch.int32, torch.uint8)
            expected = takes and (result == dtype or (dtype in HALVES and result == torch.float32))
        else:
            expected = other == dtype or (dtype in HALVES and other == torch.float32)
        assert fused(function, *data(function, (4, 3), dtype, other)) == expected, other


@EVERY_DTYPE
@pytest.mark.parametrize("function", [*WEIGHTED, *BINARY])
def test_dtypes_beside_a_weight(function, dtype):
    for other, of_weight, reduction in itertools.product(DTYPES, [*DTYPES, torch.int64], REDUCTIONS):
        x, t = data(function, (4, 3), dtype, other)
        weight = elements((4, 3), of_weight)
        run = lambda f: getattr(f, function)(x, t, weight=weight, reduction=reduction)  # noqa: B023, E731
        assert outcome(lambda: run(L)) == outcome(lambda: run(F)), (other, of_weight, reduction)  # noqa: B023


@EVERY_DTYPE
def test_dtypes_beside_a_pos_weight(dtype):
    x, t = data(BINARY[1], (4, 3), dtype)
    for of_weight, reduction in itertools.product([*DTYPES, torch.int64], REDUCTIONS):
        weight = elements((3,), of_weight)
        run = lambda f: getattr(f, BINARY[1])(x, t, pos_weight=weight, reduction=reduction)  # noqa: B023, E731
        assert outcome(lambda: run(L)) == outcome(lambda: run(F)), (of_weight, reduction)  # noqa: B023


@EVERY_REDUCTION
@pytest.mark.parametrize("function", WEIGHTED)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_dtypes_beside_a_weight_without_dimensions(function, reduction):
    # Beside a target with some, it does not take part in torch's promotion: the losses stay half, their mean does not.
    x, t = data(function, (3,), torch.float16)
    run = lambda f: getattr(f, function)(x[0], t, weight=torch.tensor(0.3), reduction=reduction)  # noqa: E731
    assert outcome(lambda: run(L)) == outcome(lambda: run(F))


@pytest.mark.parametrize("other", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@EVERY_DTYPE
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss"])
def test_integer_targets(function, dtype, other):
    x, t = (3 * random(4, 5)).to(dtype), (random(4, 5, seed=2).abs() * 3).to(other)
    for target in (t, t[:, :1].expand(4, 5)):
        for reduction in REDUCTIONS:
            run = lambda f, x, t: getattr(f, function)(x, t, reduction=reduction)  # noqa: B023, E731
            got = value_and_grads(lambda x: run(L, x, target), x)  # noqa: B023
            no_less_exact(got, value_and_grads(lambda x: run(F, x, target), x.double()), dtype)  # noqa: B023
            assert got[0].dtype == run(F, x, target).dtype == dtype


def test_two_integers():
    x, t = torch.tensor([1, -2, 3]), torch.tensor([2, 2, 2])
    assert torch.equal(L.l1_loss(x, t, reduction="none"), torch.tensor([1, 4, 1]))
    for function in FUNCTIONS:
        for reduction in REDUCTIONS:
            run = lambda f: getattr(f, function)(x, t, reduction=reduction)  # noqa: B023, E731
            assert outcome(lambda: run(L)) == outcome(lambda: run(F))  # noqa: B023


# ---- shapes

PAIRS = [((3, 1), (3,)), ((2, 3), (3,)), ((3,), (2, 3)), ((), (4,)), ((4,), ()), ((2, 1, 4), (3, 1)), ((1,), (5, 6))]


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
@pytest.mark.parametrize("sizes", PAIRS, ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
def test_broadcasting(function, sizes, module):
    of_dtypes = [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)]
    for (dtype, other), reduction in itertools.product(of_dtypes, REDUCTIONS):
        if function == "huber_loss" and dtype != other:
            continue  # whose backward torch refuses
        x, t = random(*sizes[0], seed=1).to(dtype), random(*sizes[1], seed=2).to(other)
        results, all_warnings = [], []
        for functions, modules in ((L, fusedloss), (F, nn)):
            if module:
                run = getattr(modules, MODULES[function])(reduction=reduction)
            else:
                run = lambda x, t: getattr(functions, function)(x, t, reduction=reduction)  # noqa: B023, E731
            result, caught = warned(lambda: value_and_grads(run, x, t))  # noqa: B023
            results.append(result)
            # Of a module, the file of its own forward is blamed.
            all_warnings.append([warning[: 2 if module else 3] for warning in caught])
        same(results[0], results[1], **({"rtol": 0.02, "atol": 0.01} if dtype in HALVES else {}))
        assert all_warnings[0] == all_warnings[1] and len(all_warnings[0]) == 1
        assert all_warnings[0][0][1].startswith(BROADCASTING)


@pytest.mark.parametrize("sizes", PAIRS, ids=str)
@pytest.mark.parametrize("function", WEIGHTED)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
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


MISFITS = [((3,), (4,)), ((2, 3), (2,)), ((2, 3), (2, 1)), ((2,), (2, 1)), ((0,), (3,)), ((4, 1), (0,))]


@pytest.mark.parametrize("sizes", MISFITS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
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

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("call", [*OF_TORCH, "focal, weight"])
def test_layouts(call, of_input):
    function, tensors, options = made(call, (2, 3, 4, 5), torch.float64)
    for of_target, reduction in itertools.product(LAYOUTS, REDUCTIONS):
        x, t = LAYOUTS[of_input](tensors[0]), LAYOUTS[of_target](tensors[1])
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
    x, t = (LAYOUTS[layout](random(2, 3, 4, 5, seed=i)) for i, layout in enumerate(layouts))
    for one, other in ((x, t[:, :1]), (x[:1], t), (x, t[0, 0, 0]), (x[:, :, :1], t[:, :, :, :1]), (x[0], t)):
        ours, torchs = (getattr(f, function)(one, other, reduction="none") for f in (L, F))
        same(ours, torchs, check_stride=True)


@pytest.mark.parametrize("dtype, other", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss", BINARY[1]])
def test_strides_of_losses_of_several_dtypes(function, dtype, other):
    x, t = data(function, (2, 3, 4, 5), dtype, other)
    for of_input, of_target in itertools.product(LAYOUTS.values(), LAYOUTS.values()):
        ours, torchs = (getattr(f, function)(of_input(x), of_target(t), reduction="none") for f in (L, F))
        assert ours.stride() == torchs.stride() and ours.dtype == torchs.dtype


@needs_extension
@ALL
def test_a_gradient_lies_as_its_tensor_does(call):
    function, (x, t), options = made(call, (2, 3, 4, 5), torch.float32)
    for layout in ("contiguous", "channels_last", "transposed"):
        for reduction in REDUCTIONS:
            leaves = [LAYOUTS[layout](x).detach().requires_grad_()]
            target = LAYOUTS[layout](t).detach()
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


@pytest.mark.parametrize("size", POS_WEIGHTS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_pos_weight_of_channels(dtype, layout, size):
    # (C, 1, 1) beside (N, C, H, W) is what segmentation has.
    x, t = (LAYOUTS[layout](each) for each in data(BINARY[1], (2, 3, 4, 5), dtype))
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


def memory_of(run: Callable[[], Any]) -> int:
    """Bytes that are allocated, freed again or not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
@pytest.mark.parametrize("layouts", [("contiguous",) * 2, ("channels_last",) * 2, ("channels_last", "contiguous")])
@pytest.mark.parametrize("dtype, other", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
def test_a_pos_weight_of_channels_is_read_in_place(dtype, other, layouts):
    x, t = data(BINARY[1], (2, 21, 50, 40), dtype, other)
    x, t = LAYOUTS[layouts[0]](x).requires_grad_(), LAYOUTS[layouts[1]](t)
    weight, pos_weight = elements((40,), torch.float32), elements((21, 1, 1), torch.float32)

    upstream = torch.tensor(0.75)

    def train() -> None:
        loss = L.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight)
        torch.autograd.grad(loss, x, upstream)

    with Recorder() as recorder:
        train()
    # Nothing of torch's but a look at the upstream gradient.
    assert {op for op in recorder.seen if not op.startswith("fusedloss.")} <= {"aten._local_scalar_dense.default"}
    # The gradient alone: once in forward, and once more where a bfloat16 one is made again.
    gradients = 1 if dtype == torch.float32 else 2
    assert x.nbytes <= memory_of(train) <= gradients * x.nbytes + 4096
    with torch.no_grad():
        assert memory_of(lambda: L.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight)) < 4096


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
@pytest.mark.parametrize("dtype, other", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss"])
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_operands_that_broadcast_and_differ_in_dtype_are_read_in_place(function, dtype, other):
    x, t = random(2, 21, 50, 40).to(dtype).requires_grad_(), random(21, 1, 1).to(other)
    train = lambda: torch.autograd.grad(getattr(L, function)(x, t), x)  # noqa: E731
    assert x.nbytes <= memory_of(train) <= x.nbytes + 4096


# ---- gradients of the target


@EVERY_REDUCTION
@EVERY_DTYPE
@TORCHS
def test_gradients_of_input_and_target_together_and_alone(call, dtype, reduction):
    function, (x, t), options = made(call, (30, 7), dtype)
    run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    value, of_input, of_target = value_and_grads(run, x, t)
    exact = value_and_grads(
        lambda x, t: getattr(F, function)(x, t, **as_double(options), reduction=reduction), x.double(), t.double()
    )
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": eps if dtype in HALVES else 100 * eps, "atol": 1e-5 if dtype in HALVES else 100 * eps}
    for got, expected in zip((value, of_input, of_target), exact, strict=True):
        assert got.dtype == dtype
        same(got.double(), expected, **tolerance)
    assert torch.equal(value_and_grads(lambda x: run(x, t), x)[1], of_input)
    same(value_and_grads(lambda t: run(x, t), t)[1], of_target)


@pytest.mark.parametrize("dtype, other", itertools.permutations([torch.bfloat16, torch.float32, torch.float16], 2))
@pytest.mark.parametrize("function", ["mse_loss", "l1_loss", "smooth_l1_loss", BINARY[1]])
def test_gradients_have_the_dtype_of_their_tensor(function, dtype, other):
    x, t = data(function, (30, 7), dtype, other)
    for reduction in REDUCTIONS:
        value, of_input, of_target = value_and_grads(getattr(L, function), x, t, reduction=reduction)
        assert (of_input.dtype, of_target.dtype) == (dtype, other)
        exact = value_and_grads(getattr(F, function), x.double(), t.double(), reduction=reduction)
        if fused(function, x, t):
            for got, expected in zip((value, of_input, of_target), exact, strict=True):
                no_less_exact([got], [expected], got.dtype)


@TORCHS
def test_a_tensor_that_is_input_and_target(call):
    function, (x, _), options = made(call, (6, 5), torch.float64)
    x = x.sigmoid()
    ours, torchs = (value_and_grads(lambda x: getattr(f, function)(x, x, **options), x) for f in (L, F))  # noqa: B023
    same(ours, torchs)


@pytest.mark.parametrize("which", ["input", "target", "weight"])
@ALL
def test_changing_a_saved_tensor_before_backward_is_noticed(call, which):
    function, (x, t), options = made(call, (6, 5), torch.float32)
    leaf = x.clone().requires_grad_()
    x = leaf * 1
    loss = getattr(L, function)(x, t, **options)
    changed = {"input": [x], "target": [t], "weight": [v for v in options.values() if isinstance(v, Tensor)]}[which]
    if not changed:
        pytest.skip("this call has no weight")
    with torch.no_grad():
        changed[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# ---- arguments


@pytest.mark.parametrize("size_average, reduce", [*itertools.product([None, True, False], repeat=2)][1:])
@pytest.mark.parametrize("function", [function for function in FUNCTIONS if function != "huber_loss"])
def test_size_average_and_reduce(function, size_average, reduce):
    x, t = data(function, (3, 2), torch.float32)

    def results(functions: Any, modules: Any) -> Iterator[tuple[Any, list[tuple[type, str]]]]:
        runs = (
            lambda: getattr(functions, function)(x, t, size_average=size_average, reduce=reduce, reduction="sum"),
            lambda: getattr(modules, MODULES[function])(size_average=size_average, reduce=reduce, reduction="sum")(
                x, t
            ),
        )
        for run in runs:
            value, caught = warned(run)
            yield value, [warning[:2] for warning in caught]

    for (value, caught), (expected, expected_warnings) in zip(results(L, fusedloss), results(F, nn), strict=True):
        same(value, expected)
        assert caught == expected_warnings and len(caught) == 1
        assert caught[0][1].startswith("size_average and reduce args will be deprecated")


@pytest.mark.parametrize("reduction", ["foo", "elementwise_mean", "Mean", None, 1])
@TORCHS
def test_unusual_reductions(call, reduction):
    function, (x, t), options = made(call, (3, 2), torch.float32)
    results = []
    for functions, modules in ((L, fusedloss), (F, nn)):
        value, caught = warned(lambda: getattr(functions, function)(x, t, **options, reduction=reduction))  # noqa: B023
        results.append((value, [warning[:2] for warning in caught]))
        getattr(modules, MODULES[function])(reduction=reduction)  # which no constructor looks at
    if isinstance(results[1][0], Tensor):
        same(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
    else:
        assert results[0] == results[1]


NOT_POSITIVE = [0.0, -0.0, -1.0, -1e-30, -math.inf, math.nan]
ODD = [1, True, "1", None, 1j, [1.0], torch.tensor(0.5, device="cpu"), torch.tensor([0.5], device="cpu")]


@pytest.mark.parametrize("parameter", [*NOT_POSITIVE, *ODD, math.inf, 1e-30, 1e30], ids=repr)
@pytest.mark.parametrize("function, name", [("huber_loss", "delta"), ("smooth_l1_loss", "beta")])
def test_parameters(function, name, parameter):
    x, t = data(function, (3, 2), torch.float32)
    for reduction in REDUCTIONS:
        options = {name: parameter, "reduction": reduction}
        ours, of_torch = (warned(lambda: getattr(f, function)(x, t, **options)) for f in (L, F))  # noqa: B023
        if isinstance(of_torch[0], Tensor):
            same(ours, of_torch)
        else:
            assert ours == of_torch
    if function == "huber_loss" and parameter in NOT_POSITIVE:
        assert of_torch[0] == (RuntimeError, "huber_loss does not support non-positive values for delta.")


def test_a_beta_of_zero_is_l1():
    x, t = random(50, seed=1), random(50, seed=2)
    t[::5] = x[::5]
    for reduction in REDUCTIONS:
        ours, of_l1, of_torch = (
            value_and_grads(f, x, t, reduction=reduction, **options)
            for f, options in ((L.smooth_l1_loss, {"beta": 0.0}), (L.l1_loss, {}), (F.smooth_l1_loss, {"beta": 0.0}))
        )
        assert all(torch.equal(*pair) for pair in zip(ours, of_l1, strict=True))
        same(ours, of_torch)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_tensor(function):
    for arguments in (([1.0], [2.0]), (torch.ones(2), [2.0]), (1.0, torch.ones(2))):
        ours, of_torch = (outcome(lambda: getattr(f, function)(*arguments)) for f in (L, F))  # noqa: B023
        assert ours == of_torch


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_signature_is_torchs(function):
    import inspect

    ours, of_torch = (inspect.signature(getattr(f, function)).parameters for f in (L, F))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in of_torch.values()
    ]
    ours, of_torch = (inspect.signature(getattr(f, MODULES[function])).parameters for f in (fusedloss, nn))
    assert list(ours) == list(of_torch)


# ---- probabilities

BAD = [-1e-3, -1.0, 1.01, 2.0, math.nan, math.inf, -math.inf]
RAISES = on_cpu_alone("on a GPU torch's device assert ends the process, and the loss of ours is NaN")


@RAISES
@pytest.mark.parametrize("which", ["input", "target", "both"])
@EVERY_REDUCTION
@EVERY_DTYPE
def test_what_is_no_probability_raises_as_torch(dtype, reduction, which):
    of = "target" if which == "target" else "input"
    for bad, (count, at), grad in itertools.product(BAD, ((1, 0), (5000, 4321)), (False, True)):
        x, t = data(BINARY[0], (count,), dtype)
        for tensor in {"input": [x], "target": [t], "both": [x, t]}[which]:
            tensor[at] = bad
        errors = []
        for functions in (L, F):
            with pytest.raises(RuntimeError) as caught:
                functions.binary_cross_entropy(x.requires_grad_(grad), t, reduction=reduction)
            errors.append(str(caught.value).splitlines()[0])
        assert errors[0] == errors[1] == f"all elements of {of} should be between 0 and 1"


@RAISES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_probability_is_found_wherever_it_lies(layout):
    for seed in range(3):
        x, t = data(BINARY[0], (2, 3, 40, 50), torch.float32)
        place = tuple(int(random(1, seed=seed + d).abs() * 7919) % size for d, size in enumerate(x.shape))
        for which in range(2):
            bad = [x.clone(), t.clone()]
            bad[which][place if layout != "expanded" else (place[0], 0, *place[2:])] = math.nan
            bad = [LAYOUTS[layout](each) for each in bad]
            for reduction in REDUCTIONS:
                with pytest.raises(RuntimeError, match=["all elements of input", "all elements of target"][which]):
                    L.binary_cross_entropy(*bad, reduction=reduction)


@RAISES
@pytest.mark.parametrize("place", [0, 70_000, 199_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_probability_is_found_by_every_thread(dtype, place):
    x, t = (random(200_000, seed=i).sigmoid().to(dtype) for i in (1, 2))
    x[place] = 1.5
    for reduction in REDUCTIONS:
        with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
            L.binary_cross_entropy(x, t, reduction=reduction)


@EVERY_REDUCTION
@EVERY_DTYPE
def test_a_weight_of_nan_raises_nothing(dtype, reduction):
    x, t = data(BINARY[0], (6, 5), dtype)
    for number in (math.nan, math.inf, -math.inf):
        weight = elements((6, 5), dtype)
        weight[2, 3] = number
        ours, torchs = (
            value_and_grads(lambda x: f.binary_cross_entropy(x, t, weight, reduction=reduction), x)  # noqa: B023
            for f in (L, F)
        )
        same(ours, torchs, rtol=0.05, atol=0.01)


@RAISES
@EVERY_REDUCTION
def test_a_weight_of_zero_hides_nothing(reduction):
    x, t = data(BINARY[0], (6, 5), torch.float32)
    x[2, 3] = math.nan
    for functions in (L, F):
        with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
            functions.binary_cross_entropy(x, t, torch.zeros(5), reduction=reduction)


@EVERY_DTYPE
def test_probabilities_of_zero_and_one(dtype):
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=dtype)
    t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.25], dtype=dtype)
    value = L.binary_cross_entropy(x, t, reduction="none")
    assert torch.equal(value, torch.tensor([0.0, 100, 100, 0, 50, 75], dtype=dtype))
    if dtype not in HALVES:  # in which torch's 1e-12 is 0
        ours, torchs = (value_and_grads(lambda x: f.binary_cross_entropy(x, t), x) for f in (L, F))  # noqa: B023
        same(ours, torchs)


# ---- modules

CONSTRUCTED: dict[str, Callable[[Any], nn.Module]] = {
    "mse": lambda of: of.MSELoss(),
    "l1": lambda of: of.L1Loss(reduction="sum"),
    "smooth l1": lambda of: of.SmoothL1Loss(beta=0.3),
    "smooth l1, positional": lambda of: of.SmoothL1Loss(None, None, "none", 0.3),
    "huber": lambda of: of.HuberLoss(delta=0.3),
    "huber, positional": lambda of: of.HuberLoss("sum", 2.0),
    "bce": lambda of: of.BCELoss(),
    "bce, weight": lambda of: of.BCELoss(torch.tensor([1.0, 2.0, 3.0])),
    "logits": lambda of: of.BCEWithLogitsLoss(),
    "logits, weight": lambda of: of.BCEWithLogitsLoss(torch.tensor([1.0, 2.0, 3.0])),
    "logits, pos_weight": lambda of: of.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0])),
    "logits, both": lambda of: of.BCEWithLogitsLoss(torch.rand(2, 1), pos_weight=torch.tensor(3.0), reduction="none"),
}
MODULE = pytest.mark.parametrize("name", CONSTRUCTED)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    ours = CONSTRUCTED[name](fusedloss)
    torch.manual_seed(0)
    return ours, CONSTRUCTED[name](nn)


def module_data(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return data("binary_cross_entropy" if isinstance(module, nn.BCELoss) else BINARY[1], (2, 3), dtype)


@MODULE
def test_a_module_is_torchs(name):
    ours, native = pair(name)
    assert isinstance(ours, type(native)) and type(ours).__name__ == type(native).__name__
    assert repr(ours) == repr(native)
    assert list(ours.state_dict()) == list(native.state_dict())
    assert [key for key, _ in ours.named_buffers()] == [key for key, _ in native.named_buffers()]
    assert list(ours.parameters()) == []
    assert set(vars(native)) == set(vars(ours))
    tensors = module_data(native)
    ours_, torchs = value_and_grads(ours, *tensors), value_and_grads(native, *tensors)
    same(ours_, torchs)
    same(ours(*tensors).detach(), ours_[0])


@MODULE
def test_a_module_may_be_copied_pickled_and_loaded(name):
    ours, native = pair(name)
    ours.extra = "kept"
    tensors = module_data(native)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for each in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(each) is type(ours) and each.extra == "kept"
        assert torch.equal(each(*tensors), ours(*tensors))
    fresh, _ = pair(name)
    fresh.load_state_dict(native.state_dict())
    native.load_state_dict(ours.state_dict())
    same(fresh(*tensors), native(*tensors))


@MODULE
def test_a_module_may_change_its_dtype_and_its_attributes(name):
    ours, native = pair(name)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = module_data(native, dtype)
        value, expected = ours.to(dtype)(*tensors), native.to(dtype)(*tensors)
        assert value.dtype == expected.dtype == dtype
        assert all(buffer.dtype == dtype for buffer in ours.buffers())
        same(value, expected, rtol=0.05, atol=0.02)
    assert all(buffer.dtype == torch.float16 for buffer in ours.half().buffers())
    ours, native = pair(name)
    tensors = module_data(native)
    for module in (ours, native):
        module.reduction = "sum"
        if hasattr(module, "delta"):
            module.delta = 1.7
        if hasattr(module, "beta"):
            module.beta = 1.7
        if getattr(module, "weight", None) is not None:
            module.weight = torch.tensor([0.5, 0.25, 0.75])
    same(ours(*tensors), native(*tensors))
    for module in (ours, native):
        module.reduction = "foo"
    assert outcome(lambda: ours(*tensors)) == outcome(lambda: native(*tensors))


def test_keys_that_a_module_lacks_are_refused_as_torch_does():
    for key in ("weight", "pos_weight"):
        errors = []
        for of in (fusedloss, nn):
            with pytest.raises(RuntimeError, match="Unexpected key") as caught:
                of.BCEWithLogitsLoss().load_state_dict({key: torch.ones(3)})
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


@MODULE
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_may_be_scripted(name):
    ours, native = pair(name)
    tensors = module_data(native)
    same(torch.jit.script(ours)(*tensors), native(*tensors))


# ---- autocast


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype=dtype)


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


AUTOCAST = [pytest.param(call, marks=on_cpu_alone("torch refuses it")) if "bce" in call else call for call in OF_TORCH]


@pytest.mark.parametrize("other", [None, torch.float32], ids=["half target", "float32 target"])
@EVERY_REDUCTION
@pytest.mark.parametrize("call", AUTOCAST)
@EVERY_HALF
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
@pytest.mark.parametrize("call", [*AUTOCAST, "focal", "focal, weight"])
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


@pytest.mark.parametrize("call", AUTOCAST)
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


# ---- torch.compile

COMPILED = {call: (call, None) for call in CALLS}
COMPILED.update(
    {f"{call}, float32 target": (call, torch.float32) for call in ("mse", "l1", "smooth l1", "logits", "focal")}
)


def compiled_with_ops(run: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[str]]:
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    return torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True), ops


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_keeps_the_fused_op(name, reduction):
    call, other = COMPILED[name]
    dtype = torch.float32 if other is None else torch.bfloat16
    function, tensors, options = made(call, (6, 5), dtype, other)
    targets = 0 if "focal" in call else 1
    run = lambda *given: getattr(L, function)(*given, *tensors[len(given) :], **options, reduction=reduction)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    for leaves in (tensors[:1], tensors[: 1 + targets]):  # without and with a gradient of the target
        got, expected = value_and_grads(compiled, *leaves), value_and_grads(run, *leaves)
        for one, wanted in zip(got, expected, strict=True):
            assert one.dtype == wanted.dtype
        same(got, expected)
    fused_ops = [op for op in ops if op.startswith("fusedloss.")]
    assert f"fusedloss.{function.removesuffix('_loss')}.default" in fused_ops
    assert f"fusedloss.{function.removesuffix('_loss')}_backward.default" in fused_ops


WIDER_WEIGHTS = [
    *(("mse_loss", {"weight": torch.float32}), ("l1_loss", {"weight": torch.float32})),
    (BINARY[1], {"weight": torch.float32}),
    (BINARY[1], {"pos_weight": torch.float32}),
    (BINARY[1], {"weight": torch.float32, "pos_weight": torch.float32}),
    ("sigmoid_focal_loss", {"weight": torch.float32}),
]


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function, weights", WIDER_WEIGHTS, ids=str)
def test_compile_gives_the_dtype_of_eager_beside_wider_weights(function, weights, reduction, dtype=torch.bfloat16):
    x, t = data(function if "focal" not in function else BINARY[1], (6, 5), dtype)
    options = {name: elements((6, 5), each) for name, each in weights.items()}
    run = lambda x: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    compiled, _ = compiled_with_ops(run)
    expected, got = value_and_grads(run, x), value_and_grads(compiled, x)
    assert fused(function, x, t, **options, reduction=reduction)
    assert [each.dtype for each in got] == [each.dtype for each in expected]
    same(got, expected)


@needs_extension
@pytest.mark.parametrize("sizes", PAIRS[1:5], ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_compile_broadcasts(function, sizes):
    x, t = random(*sizes[0], seed=1), random(*sizes[1], seed=2)
    for reduction in ("mean", "none"):
        run = lambda x, t: getattr(L, function)(x, t, reduction=reduction)  # noqa: B023, E731
        compiled, ops = compiled_with_ops(run)
        same(value_and_grads(compiled, x, t), value_and_grads(run, x, t))
        assert any(op.startswith("fusedloss.") for op in ops)


@needs_extension
@pytest.mark.parametrize("layouts", itertools.product(["contiguous", "channels_last", "sliced"], repeat=2), ids=str)
@pytest.mark.parametrize("call", ["mse", "huber, weight", "bce", "logits, both", "focal"])
def test_compile_keeps_the_strides(call, layouts):
    function, (x, t), options = made(call, (2, 3, 4, 5), torch.float32)
    x, t = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](t)
    compiled, _ = compiled_with_ops(lambda x, t: getattr(L, function)(x, t, **options, reduction="none"))
    same(compiled(x, t), getattr(L, function)(x, t, **options, reduction="none"), check_stride=True)


@needs_extension
@pytest.mark.parametrize("call", AUTOCAST)
def test_compile_under_autocast(call):
    function, tensors, options = made(call, (6, 5), torch.bfloat16)
    run = lambda *given: getattr(L, function)(*given, **options)  # noqa: E731
    compiled, ops = compiled_with_ops(run)
    with autocast(torch.bfloat16):
        got, expected = value_and_grads(compiled, *tensors), value_and_grads(run, *tensors)
    assert [each.dtype for each in got] == [each.dtype for each in expected]
    same(got, expected)
    assert any(op.startswith("fusedloss.") for op in ops)


@needs_extension
@RAISES
def test_compile_checks_probabilities():
    compiled, ops = compiled_with_ops(L.binary_cross_entropy)
    x, t = data(BINARY[0], (6, 5), torch.float32)
    same(compiled(x, t), F.binary_cross_entropy(x, t))
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        compiled(x + 1, t)
    assert "fusedloss.binary_cross_entropy.default" in ops


@needs_extension
@pytest.mark.parametrize(
    "layouts", [("contiguous",) * 2, ("channels_last", "sliced"), ("expanded", "transposed")], ids=str
)
@pytest.mark.parametrize("call", ["mse, weight", "huber, weight", "bce, weight", "logits, both", "focal, weight"])
def test_opcheck(call, layouts):
    # Every argument of the ops, in any layout: what a compiler is promised is what they return.
    function, _, options = made(call, (2, 3, 4, 5), torch.float32)
    op = getattr(torch.ops.fusedloss, function.removesuffix("_loss"))
    backward = getattr(torch.ops.fusedloss, function.removesuffix("_loss") + "_backward")
    params = [value for value in options.values() if not isinstance(value, Tensor)]
    params = [0.25, 2.0] if "focal" in call else params
    mixed = [(torch.float32, False), *([(torch.bfloat16, True)] if function not in ("huber_loss", BINARY[0]) else [])]
    for (dtype, wide), reduction in itertools.product(mixed, (0, 1)):
        x, t = made(call, (2, 3, 4, 5), dtype, torch.float32)[1]
        x, t = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](t)
        given = (t, options["weight"], reduction, params, options.get("pos_weight"), wide)
        torch.library.opcheck(op.default, (x.detach().requires_grad_(), *given))
        upstream = torch.ones_like(op(x, *given))
        for of_target in (False, True)[: 1 if "focal" in call else 2]:
            torch.library.opcheck(backward.default, (upstream, x, *given, of_target))


# ---- what is kept for backward


@needs_extension
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@ALL
def test_hooks_see_the_inputs_and_nothing_else_is_kept(call, reduction):
    function, (x, t), options = made(call, (6, 5), torch.float32)
    leaf = x.clone().requires_grad_()
    loss = getattr(L, function)(leaf, t, **options, reduction=reduction)
    (expected,) = torch.autograd.grad(loss, leaf)
    given = {each.data_ptr() for each in (leaf, t, *options.values()) if isinstance(each, Tensor)}
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Recorder() as recorder:
        loss = getattr(L, function)(leaf, t, **options, reduction=reduction)
    assert not any("with_grad" in op for op in recorder.seen)
    # A mean by weights divides by a sum of its own.
    kept = [tensor for tensor in seen if tensor.numel() > 1]
    assert kept and all(tensor.data_ptr() in given for tensor in kept)
    same(torch.autograd.grad(loss, leaf)[0], expected)


@needs_extension
@on_cpu_alone("counts the CPU's allocations")
@ALL
def test_a_checkpointed_loss_keeps_nothing(call):
    function, (x, t), options = made(call, (40, 500), torch.float32)
    leaf = x.clone().requires_grad_()
    run = lambda x: getattr(L, function)(x, t, **options, reduction="sum")  # noqa: E731
    expected = value_and_grads(run, x)
    losses: list[Tensor] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        losses.append(checkpoint(run, leaf, use_reentrant=False))
    events = profiled.profiler.kineto_results.events()
    assert sum(event.nbytes() for event in events if event.name() == "[memory]") < x.nbytes / 10
    (grad,) = torch.autograd.grad(losses[0], leaf, upstream_of(losses[0]))
    same([losses[0].detach(), grad], expected)


@EVERY_DTYPE
@ALL
def test_the_same_bits_twice(call, dtype):
    function, (x, t), options = made(call, (3, 4, 5, 6), dtype)
    leaves = [x, t] if "focal" not in call else [x]
    for layout, reduction in itertools.product(("contiguous", "sliced"), ("mean", "sum")):
        leaves[0] = LAYOUTS[layout](x).detach()
        for leaf in leaves:
            leaf.requires_grad_()
        for upstream in (1.0, 0.3, 2.0, -0.3, 0.0, 3e4):
            loss = getattr(L, function)(leaves[0], t, **options, reduction=reduction)
            given = torch.full_like(loss, upstream)
            first = [each.clone() for each in torch.autograd.grad(loss, leaves, given, retain_graph=True)]
            torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.7), retain_graph=True)
            second = torch.autograd.grad(loss, leaves, given)
            assert all(torch.equal(*each) for each in zip(first, second, strict=True)), (layout, reduction, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@ALL
def test_an_upstream_gradient_reaches_what_forward_made(call, dtype):
    function, tensors, options = made(call, (7, 6), dtype)
    tensors = tensors[:1] if "focal" in call else tensors
    t = made(call, (7, 6), dtype)[1][1]

    def grads(
        run: Callable[..., Tensor], given: list[Tensor], target: Tensor, options: dict[str, Any], upstream: float
    ) -> Any:
        leaves = [each.detach().clone().requires_grad_() for each in given]
        loss = run(*(leaves if len(leaves) > 1 else (leaves[0], target)), **options, reduction="mean")
        # Through a product, as a loss scale or a sum of weighted losses has it.
        return torch.autograd.grad(loss * upstream, leaves)

    exact_options = as_double(options)
    # The product rounds its factor to bfloat16.
    eps = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 64 * torch.finfo(dtype).eps
    for upstream in (0.3, -2.0, 0.0, 65536.0, 1e-3):
        got = grads(getattr(L, function), tensors, t, options, upstream)
        exact = grads(of_torch(function), [each.double() for each in tensors], t.double(), exact_options, upstream)
        for one, other in zip(got, exact, strict=True):
            same(one.double(), other, rtol=eps, atol=eps * abs(upstream) / 100)


# ---- threads

STRIDED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sliced": lambda x, t: (LAYOUTS["sliced"](x), t),
    "channels_last beside contiguous": lambda x, t: (LAYOUTS["channels_last"](x), t),
    "transposed": lambda x, t: (LAYOUTS["transposed"](x), LAYOUTS["transposed"](t)),
    "expanded": lambda x, t: (x, LAYOUTS["expanded"](t)),
    "mixed": lambda x, t: (x.bfloat16(), t),
    "mixed and sliced": lambda x, t: (LAYOUTS["sliced"](x.half()), LAYOUTS["channels_last"](t)),
    "broadcast": lambda x, t: (x, t[:, :1, :, :1]),
}


@needs_extension
@on_cpu_alone("about the CPU's threads")
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize(
    "call", ["mse", "l1, weight", "smooth l1", "huber, weight", "bce, weight", "logits, both", "focal"]
)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_any_number_of_threads_gives_the_same_bits(call, layout):
    function, _, options = made(call, (4, 8, 61, 113), torch.float32)
    x, t = STRIDED[layout](*made(call, (4, 8, 61, 113), torch.float32)[1])
    if "broadcast" in layout and function not in OF_DIFFERENCE:
        pytest.skip("its operands have one size")
    if "mixed" in layout and function in ("huber_loss", "binary_cross_entropy"):
        pytest.skip("its operands have one dtype")
    assert fused(function, x, t, **options)
    leaves = [x.detach().requires_grad_()]
    if "focal" not in call:
        leaves.append(t.detach().requires_grad_())
        t = leaves[1]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for reduction in REDUCTIONS:
            value = getattr(L, function)(leaves[0], t, **options, reduction=reduction)
            results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
    torch.set_num_threads(before)
    for i, result in enumerate(results[3:]):
        for one, other in zip(result, results[i % 3], strict=True):
            assert torch.equal(one, other)


# ---- derivatives


@EVERY_REDUCTION
@TORCHS
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_gradcheck_and_gradgradcheck(call, reduction):
    function, tensors, options = made(call, (2, 2), torch.float64)
    leaves = [each.requires_grad_() for each in tensors]
    run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: E731
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)
    assert gradcheck(lambda t: run(tensors[0].detach(), t), leaves[1:])
    if function in ("smooth_l1_loss", "huber_loss", "mse_loss", "l1_loss"):
        assert gradgradcheck(lambda t: run(tensors[0].detach(), t), leaves[1:])


@pytest.mark.parametrize("sizes", [((3, 1), (2,)), ((), (3,)), ((2, 3), ())], ids=str)
@pytest.mark.parametrize("function", OF_DIFFERENCE)
@pytest.mark.filterwarnings(f"ignore:{BROADCASTING}")
def test_gradcheck_of_what_broadcasts(function, sizes):
    leaves = [random(*size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    for options in ({}, {"weight": elements(sizes[0], torch.float64)} if function in WEIGHTED else {}):
        for reduction in REDUCTIONS:
            run = lambda x, t: getattr(L, function)(x, t, **options, reduction=reduction)  # noqa: B023, E731
            assert gradcheck(run, leaves)
            assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("size", [(), (3,), (2, 1), (2, 3)], ids=str)
@EVERY_REDUCTION
def test_gradcheck_with_a_pos_weight(size, reduction):
    x, t = (each.requires_grad_() for each in data(BINARY[1], (2, 3), torch.float64))
    options = {"weight": elements((3,), torch.float64), "pos_weight": elements(size, torch.float64)}
    run = lambda x, t: L.binary_cross_entropy_with_logits(x, t, **options, reduction=reduction)  # noqa: E731
    assert gradcheck(run, (x, t))
    assert gradgradcheck(run, (x, t))


@EVERY_HALF
@pytest.mark.parametrize("call", ["mse", "smooth l1", "logits, pos_weight", "focal"])
def test_a_double_backward_of_several_dtypes(call, dtype):
    function, (x, t), options = made(call, (4, 3), dtype, torch.float32)
    seconds = []
    for run, other in ((getattr(L, function), torch.float32), (of_torch(function), torch.float64)):
        leaf = x.detach().to(dtype if other == torch.float32 else other).requires_grad_()
        given = options if other == torch.float32 else as_double(options)
        value = run(leaf, t.to(other), **given, reduction="sum")
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    assert seconds[0].dtype == dtype
    same(seconds[0].double(), seconds[1], rtol=0.03, atol=0.03)
