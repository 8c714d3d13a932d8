"""Class indices as targets of the two binary cross-entropies: against torch's loss of their one-hot in float64."""

import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import EPSILON, largest_error, value_and_grad, warned
from index_calls import data, one_hot, weights_of
from losses import DTYPES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import bytes_allocated, compiled_with_ops, holds
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

PROBABILITIES, LOGITS = "binary_cross_entropy", "binary_cross_entropy_with_logits"
MODULES = {PROBABILITIES: "BCELoss", LOGITS: "BCEWithLogitsLoss"}
SHAPES = [(5, 1), (33, 1), (257, 80), (3, 2500), (2, 3, 7), (3, 5, 40), (2, 21, 9, 11)]
each_function = pytest.mark.parametrize("function", MODULES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def rows(function: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs, NaN in ignored rows, and targets of every kind."""
    x, y = data(shape)
    return (x.sigmoid().clamp(0.05, 0.95) if function == PROBABILITIES else x).to(dtype), y


def loss(function: str, **options) -> Callable[..., Tensor]:
    return lambda x, y, r: getattr(L, function)(x, y, reduction=r, **{"ignore_index": -100, **options})


def torchs(
    function: str, ignore_index: int = -100, **factors: Tensor | None
) -> Callable[[Tensor, Tensor, str], Tensor]:
    """torch's loss of the one-hot; ignored rows are taken out by hand."""

    def of_one_hot(x: Tensor, y: Tensor, reduction: str) -> Tensor:
        kept = (y != ignore_index).unsqueeze(1).expand_as(x)
        t = one_hot(y, x.shape[1], x.dtype)
        wide = {name: factor if factor is None else factor.to(x.dtype) for name, factor in factors.items()}
        losses = getattr(F, function)(torch.where(kept, x, 0.5), t, reduction="none", **wide)
        return {"none": losses * kept, "sum": losses[kept].sum(), "mean": losses[kept].mean()}[reduction]

    return of_one_hot


def assert_close_to_torch(function: str, x: Tensor, y: Tensor, reduction: str, **factors: Tensor | None) -> None:
    value, grad, upstream = value_and_grad(loss(function, **factors), x, y, reduction)
    expected, expected_grad, _ = value_and_grad(torchs(function, **factors), x.double(), y, reduction, upstream)
    assert value.dtype == grad.dtype == x.dtype
    # One rounding of the result in half types; a few of them in the arithmetic otherwise.
    bound = (1.01 if x.dtype.itemsize == 2 else 24) * EPSILON[x.dtype]
    assert largest_error(value, expected) <= bound
    assert largest_error(grad, expected_grad) <= bound


# ---- values


@pytest.mark.thinned
@each_reduction
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_function
def test_value_and_gradient_are_those_of_the_one_hot(function, shape, dtype, reduction):
    assert_close_to_torch(function, *rows(function, shape, dtype), reduction)


@pytest.mark.thinned
@each_reduction
@each_dtype
@pytest.mark.parametrize("shape", [(33, 1), (257, 80), (2, 21, 9, 11)], ids=str)
@each_function
def test_weights(function, shape, dtype, reduction):
    x, y = rows(function, shape, dtype)
    weights = weights_of(shape, dtype)
    for weight in weights.values():
        assert_close_to_torch(function, x, y, reduction, weight=weight)
    if function == LOGITS:
        for pos_weight in weights.values():
            assert_close_to_torch(function, x, y, reduction, pos_weight=pos_weight)
        assert_close_to_torch(function, x, y, reduction, weight=weights["rows"], pos_weight=weights["classes"])


@each_reduction
@each_function
def test_any_index_can_be_the_ignored_one(function, reduction):
    x = rows(function, (8, 5))[0].nan_to_num(0.5)
    for ignored in (2, 5, 9, -1):
        y = torch.tensor([0, 1, ignored, 3, 4, 2, ignored, 5])
        got = value_and_grad(loss(function, ignore_index=ignored), x, y, reduction)
        expected = value_and_grad(torchs(function, ignore_index=ignored), x, y, reduction)
        torch.testing.assert_close(got, expected)


@each_function
def test_ignored_rows_may_hold_anything(function):
    x, y = rows(function, (9, 7), torch.float32)
    ignored = (y == -100).unsqueeze(1).expand_as(x)
    assert ignored.any() and x[ignored].isnan().all()
    for reduction in REDUCTIONS:
        expected = value_and_grad(loss(function), x.nan_to_num(0.5), y, reduction)[:2]
        for special in (float("nan"), float("inf"), -float("inf"), -3.0):
            got = value_and_grad(loss(function), x.masked_fill(ignored, special), y, reduction)[:2]
            assert all(map(torch.equal, got, expected)) and (got[1][ignored] == 0).all()


@each_function
def test_a_mean_over_nothing_is_nan_without_a_gradient(function):
    x, y = rows(function, (6, 5), torch.float32)
    y.fill_(-100)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
        value, grad, _ = value_and_grad(loss(function), x, y, reduction)
        torch.testing.assert_close(value, torch.full_like(value, expected), equal_nan=True)
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@each_function
def test_other_integers_are_converted(function, dtype):
    x, _ = rows(function, (4, 3))
    x, y = x.nan_to_num(0.5), torch.tensor([0, 2, 3, 1])
    torch.testing.assert_close(loss(function)(x, y.to(dtype), "mean"), loss(function)(x, y, "mean"))


def test_what_is_no_probability_raises_in_rows_that_count():
    x, y = rows(PROBABILITIES, (9, 7), torch.float32)
    x[0] = torch.tensor(1.5)
    assert y[0] != -100
    if x.is_cpu:
        with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
            loss(PROBABILITIES)(x, y, "mean")
    else:
        assert loss(PROBABILITIES)(x, y, "mean").isnan()


# ---- derivatives and the route


@pytest.mark.thinned
@each_reduction
@pytest.mark.parametrize("weighted", [None, "classes", "rows", "elements"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2)], ids=str)
@each_function
def test_gradcheck_and_gradgradcheck(function, shape, weighted, reduction):
    x, y = rows(function, shape)
    x = x.nan_to_num(0.5).requires_grad_()
    weight = weights_of(shape, torch.float64).get(weighted)
    options = {"weight": weight} if function == PROBABILITIES else {"weight": weight, "pos_weight": weight}
    run = lambda x: loss(function, **options)(x, y, reduction)  # noqa: E731
    assert gradcheck(run, x) and gradgradcheck(run, x)


@needs_extension
@each_dtype
@each_function
def test_explain_says_fused(function, dtype):
    for shape in SHAPES:
        x, y = rows(function, shape, dtype)
        for weight in (None, *weights_of(shape, dtype).values()):
            for reduction in REDUCTIONS:
                arguments = (loss(function, weight=weight), x, y, reduction)
                assert fusedloss.explain(*arguments).startswith("fused: ")
            if function == LOGITS and x.is_cpu:
                assert fusedloss.explain(loss(function, pos_weight=weight), x, y, "mean").startswith("fused: ")


@needs_extension
@pytest.mark.parametrize("dynamic", [False, True])
@each_function
def test_compile_keeps_the_fused_ops_in_one_graph(function, dynamic):
    x, y = rows(function, (9, 7), torch.float32)
    module = getattr(fusedloss, MODULES[function])(torch.rand(7), ignore_index=-100)
    compiled, ops = compiled_with_ops(module, dynamic=dynamic)
    for target in (y, y.int()):
        ops.clear()
        results = []
        for run in (module, compiled):
            leaf = x.clone().requires_grad_()
            value = run(leaf, target)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
        assert holds(ops, function) and holds(ops, f"{function}_backward")


@needs_extension
@on_cpu_alone("counts the CPU's allocations")
@each_function
def test_no_one_hot_is_built(function):
    x, y = rows(function, (1000, 800), torch.float32)
    x.requires_grad_()
    assert bytes_allocated(lambda: torch.autograd.grad(loss(function)(x, y, "mean"), x)) <= 1.01 * x.nbytes


# ---- what is refused


@on_cpu_alone("a GPU tells of it at the next call; kernels/test_indexed_cuda.py")
@each_function
def test_a_target_out_of_range_raises(function):
    x, _ = rows(function, (3, 4))
    x, y = x.nan_to_num(0.5).requires_grad_(), torch.tensor([2, 7, 1])
    native = torch.rand(4, dtype=torch.float64, requires_grad=True)  # a weight that no kernel takes
    for reduction in REDUCTIONS:
        for weight in (None, native):
            with pytest.raises(IndexError, match="Target 7 is out of bounds."):
                loss(function, weight=weight)(x, y, reduction)
    loss(function, ignore_index=7)(x, y, "mean")


REJECTED = {
    "batch": ((3, 4), torch.tensor([0, 1]), {}, "must be the same as input size"),
    "rank": ((3, 4), torch.zeros(3, 4, dtype=torch.long), {}, "must be the same as input size"),
    "no classes": ((4,), torch.tensor(1), {}, "must be the same as input size"),
    "float": ((3, 4), torch.ones(3), {}, "arget size"),
    "bool": ((3, 4), torch.ones(3, dtype=torch.bool), {}, "ignore_index needs targets of a floating point or integer"),
    "reduction": ((3, 4), torch.tensor([0, 1, 2]), {"reduction": "avg"}, "avg is not a valid value for reduction"),
    "weight": ((3, 4), torch.tensor([0, 1, 2]), {"weight": torch.ones(3)}, "weight must broadcast"),
    "wide weight": ((3, 4), torch.tensor([0, 1, 2]), {"weight": torch.ones(2, 3, 4)}, "weight must broadcast"),
}


@pytest.mark.parametrize("case", REJECTED)
@each_function
def test_rejected(function, case):
    shape, target, options, message = REJECTED[case]
    with pytest.raises(ValueError, match=message):
        getattr(L, function)(torch.full(shape, 0.5), target, **options, ignore_index=-100)


def test_a_pos_weight_that_does_not_broadcast_is_rejected():
    with pytest.raises(ValueError, match="pos_weight must broadcast"):
        loss(LOGITS, pos_weight=torch.ones(3))(torch.zeros(3, 4), torch.tensor([0, 1, 2]), "mean")


@each_function
def test_without_an_ignore_index_torch_is_heard(function):
    x = torch.full((3, 4), 0.5)
    for target in (torch.tensor([0, 1, 2]), torch.zeros(3, 4, dtype=torch.long), torch.ones(3)):
        ours, expected = (warned(lambda: getattr(f, function)(x, target))[0] for f in (L, F))  # noqa: B023
        if isinstance(expected, Tensor):
            torch.testing.assert_close(ours, expected)
        else:
            assert ours == expected


# ---- modules


@each_function
def test_module(function):
    x, y = rows(function, (6, 5), torch.float32)
    weight = torch.rand(5)
    module = getattr(fusedloss, MODULES[function])(weight, ignore_index=-100)
    expected = loss(function, weight=weight)(x, y, "mean")
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for each in (module, pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert torch.equal(each(x, y), expected)
    assert list(module.state_dict()) == ["weight"]
    assert module.double()(x.double(), y).dtype == torch.float64
    with pytest.raises(TypeError):
        getattr(fusedloss, MODULES[function])(None, None, None, "mean", None, -100)


@each_function
def test_a_module_pickled_without_the_attribute_takes_torchs_targets(function):
    old = getattr(fusedloss, MODULES[function]).__new__(getattr(fusedloss, MODULES[function]))
    old.__dict__.update(getattr(nn, MODULES[function])().__dict__)
    x, t = torch.rand(2, 3, 4)
    assert "ignore_index" not in vars(old) and torch.equal(old(x, t), getattr(L, function)(x, t))


@each_function
def test_torchscript_refuses_what_torchs_module_cannot_do(function):
    with pytest.raises(RuntimeError, match=f"torch's {MODULES[function]}, which knows no ignore_index"):
        torch.jit.script(getattr(fusedloss, MODULES[function])(ignore_index=0))
