"""Arguments, probabilities and modules as torch has them, to the letter of what is raised."""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import outcome, same, value_and_grads, warned
from layouts import laid_out
from losses import HALVES, REDUCTIONS
from pointwise_calls import (
    BINARY,
    EVERY_DTYPE,
    EVERY_REDUCTION,
    FUNCTIONS,
    IMAGE_LAYOUTS,
    MODULES,
    RAISES,
    TORCHS,
    assert_reduction_as_in_torch,
    data,
    elements,
    made,
    random,
)
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as L

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
    function, tensors, options = made(call, (3, 2), torch.float32)
    assert_reduction_as_in_torch(function, MODULES[function], tensors, options, reduction)


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

    ours_alone = {"ignore_index": None} if function in BINARY else {}
    if function == "binary_cross_entropy_with_logits":
        ours_alone |= {"label_smoothing": 0.0, "target_threshold": None}
    added = [(name, default, inspect.Parameter.KEYWORD_ONLY) for name, default in ours_alone.items()]
    ours, of_torch = (inspect.signature(getattr(f, function)).parameters for f in (L, F))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        *((p.name, p.default, p.kind) for p in of_torch.values()), *added
    ]  # fmt: skip
    ours, of_torch = (inspect.signature(getattr(f, MODULES[function])).parameters for f in (fusedloss, nn))
    assert list(ours) == [*of_torch, *(name for name, *_ in added)]


# ---- probabilities

BAD = [-1e-3, -1.0, 1.01, 2.0, math.nan, math.inf, -math.inf]


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
@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
def test_what_is_no_probability_is_found_wherever_it_lies(layout):
    for seed in range(3):
        x, t = data(BINARY[0], (2, 3, 40, 50), torch.float32)
        place = tuple(int(random(1, seed=seed + d).abs() * 7919) % size for d, size in enumerate(x.shape))
        for which in range(2):
            bad = [x.clone(), t.clone()]
            bad[which][place if layout != "expanded columns" else (place[0], 0, *place[2:])] = math.nan
            bad = [laid_out(each, layout) for each in bad]
            for reduction in REDUCTIONS:
                with pytest.raises(RuntimeError, match=["all elements of input", "all elements of target"][which]):
                    L.binary_cross_entropy(*bad, reduction=reduction)


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
