"""The losses of three operands, margin ranking and the Gaussian likelihood: torch's results, gradients, errors."""

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import autocast, error, no_less_exact, outcome, same, upstream_of, value_and_grads, warned
from layouts import laid_out
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, not_under_a_default_device, on_cpu_alone
from observe import Recorder, compiled_with_ops
from pointwise_calls import IMAGE_LAYOUTS, assert_reduction_as_in_torch, random
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranking": ("margin_ranking_loss", {"margin": 0.7}),
    "gaussian": ("gaussian_nll_loss", {}),
    "gaussian, full": ("gaussian_nll_loss", {"full": True, "eps": 0.3}),
}
MODULES = {"margin_ranking_loss": "MarginRankingLoss", "gaussian_nll_loss": "GaussianNLLLoss"}
ALL = pytest.mark.parametrize("call", CALLS)
EVERY_FUNCTION = pytest.mark.parametrize("function", MODULES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(call: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """The operands in float64: two that are subtracted, and labels or variances."""
    x, t, third = (random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return [2 * x, t, 2 * (third > 0).double() - 1 if call == "ranking" else third.abs() + 0.1]


def made(call: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> tuple[str, list[Tensor], dict[str, Any]]:
    """The function, the operands, of one dtype or of one each, and the options."""
    function, options = CALLS[call]
    dtypes = dtypes * 3 if len(dtypes) == 1 else dtypes
    operands = [
        (each.abs() if dtype == torch.uint8 else each).to(dtype)
        for each, dtype in zip(numbers(call, shape, shape, shape), dtypes, strict=True)
    ]
    return function, operands, options


def of(functions: Any, call: str, **more: Any) -> Callable[..., Tensor]:
    function, options = CALLS[call]
    return lambda *operands: getattr(functions, function)(*operands, **options, **more)


def fused(call: str, *operands: Tensor, **more: Any) -> bool:
    return fusedloss.explain(of(L, call, **more), *operands).startswith("fused")


# ---- values, dtypes


@EVERY_DTYPE
@ALL
def test_value_and_gradients_against_float64(call, dtype):
    _, operands, _ = made(call, (30, 7), dtype)
    assert fusedloss._library.extension is None or fused(call, *operands)
    for reduction in REDUCTIONS:
        got = value_and_grads(of(L, call, reduction=reduction), *operands)
        exact = value_and_grads(of(F, call, reduction=reduction), *(each.double() for each in operands))
        assert all(each.dtype == dtype for each in got)
        no_less_exact(got, exact, dtype)


@ALL
def test_every_choice_of_operands_that_require_a_gradient(call):
    _, operands, _ = made(call, (9, 4), torch.float32)
    for wanted, reduction in itertools.product(itertools.product([False, True], repeat=3), REDUCTIONS):
        results = []
        for functions in (L, F):
            leaves = [each.clone().requires_grad_(want) for each, want in zip(operands, wanted, strict=True)]
            value = of(functions, call, reduction=reduction)(*leaves)
            assert value.requires_grad == any(wanted)
            if any(wanted):
                value.backward(upstream_of(value))
            results.append([value.detach(), *(leaf.grad for leaf in leaves)])
        for ours, torchs in zip(*results, strict=True):
            assert (ours is None) == (torchs is None)
            same(ours, torchs) if ours is not None else None


OTHERS = [*DTYPES, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
@ALL
def test_dtypes_of_result_and_gradients(call, dtype):
    for of_target, of_third in itertools.product(OTHERS, repeat=2):
        _, operands, _ = made(call, (4, 3), dtype, of_target, of_third)

        def run(functions, operands=operands):
            leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in operands]
            value = of(functions, call, reduction="none")(*leaves)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            grads = torch.autograd.grad(value.sum(), wanted) if wanted else []
            return [value.detach(), *grads]

        ours, torchs = (warned(lambda: run(f))[0] for f in (L, F))  # noqa: B023
        if isinstance(torchs, tuple):
            assert ours == torchs, (of_target, of_third)
        else:
            assert [each.dtype for each in ours] == [each.dtype for each in torchs], (of_target, of_third)
            some_half = {dtype, of_target, of_third} & set(HALVES)
            same(ours, torchs, **({"rtol": 0.1, "atol": 1.0} if some_half else {"rtol": 1e-5, "atol": 1e-5}))


@needs_extension
@EVERY_DTYPE
@ALL
def test_dtypes_that_run_fused(call, dtype):
    for of_target, of_third in itertools.product(OTHERS, repeat=2):
        _, operands, _ = made(call, (4, 3), dtype, of_target, of_third)
        promoted = torch.promote_types(torch.promote_types(dtype, of_target), of_third)
        expected = promoted == dtype or (dtype in HALVES and promoted == torch.float32)
        expected = expected and of_target in (*DTYPES, torch.int64, torch.int8, torch.uint8)
        expected = expected and of_third in (*DTYPES, *[torch.int64] * (call == "ranking"))
        assert fused(call, *operands, reduction="sum") == expected, (of_target, of_third)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@ALL
def test_an_operand_without_dimensions_gives_way_as_in_torch(call, wide):
    for which in itertools.product([False, True], repeat=3):
        operands = [
            each[0].to(wide) if without else each
            for each, without in zip(made(call, (3,), torch.bfloat16)[1], which, strict=True)
        ]
        assert outcome(lambda: of(L, call)(*operands)) == outcome(lambda: of(F, call)(*operands)), which  # noqa: B023


@pytest.mark.parametrize(
    "labels", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=str
)
@EVERY_DTYPE
def test_integer_labels(dtype, labels):
    _, (x, t, y), _ = made("ranking", (5, 4), dtype)
    for label, reduction in itertools.product((y.to(labels), y[:1].to(labels).expand(5, 4)), REDUCTIONS):

        def run(f, label=label, reduction=reduction):
            ranked = lambda x, t: of(f, "ranking", reduction=reduction)(x, t, label)  # noqa: E731
            return warned(lambda: value_and_grads(ranked, x, t))[0]

        ours, torchs = run(L), run(F)
        if isinstance(torchs, tuple):
            assert ours == torchs
        else:
            assert ours[0].dtype == torchs[0].dtype
            same(ours, torchs, **({"rtol": 0.05, "atol": 0.1} if dtype in HALVES else {"rtol": 1e-5, "atol": 1e-6}))


# ---- shapes, strides

TRIPLES = [
    ((3, 1), (1, 4), (3, 4)), ((3, 4), (3, 4), (3, 1)), ((3, 1), (3, 1), (3, 4)), ((1, 1), (1, 4), (1, 1)),
    ((2, 1, 4), (2, 3, 4), (1, 1, 1)), ((3, 4), (1, 4), (3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", TRIPLES, ids=str)
def test_broadcasting_of_rankings(shapes):
    operands = numbers("ranking", *shapes)
    assert fusedloss._library.extension is None or fused("ranking", *operands)
    for reduction in REDUCTIONS:
        same(*(value_and_grads(of(f, "ranking", reduction=reduction), *operands) for f in (L, F)))


SHAPES = [
    (),
    (1,),
    (3,),
    (4,),
    (2,),
    (2, 3),
    (2, 1),
    (1, 3),
    (1, 1),
    (2, 4),
    (2, 1, 3),
    (2, 1, 1),
    (3, 3),
    (0,),
    (2, 0),
]


@pytest.mark.parametrize("of_input", [(), (1,), (3,), (2, 3), (2, 1, 3), (1, 3), (2, 0), (0,), (2, 1)], ids=str)
@ALL
def test_shapes(call, of_input):
    for of_target, of_third in itertools.product(SHAPES, repeat=2):
        operands = numbers(call, of_input, of_target, of_third)
        for reduction in ("mean", "none"):
            ours, torchs = (
                warned(lambda: value_and_grads(of(f, call, reduction=reduction), *operands))[0]  # noqa: B023
                for f in (L, F)
            )
            if isinstance(torchs, tuple):
                assert ours == torchs, (of_target, of_third)
            else:
                same(ours, torchs)


@pytest.mark.parametrize("of_input", IMAGE_LAYOUTS)
@ALL
def test_layouts(call, of_input):
    _, operands, _ = made(call, (2, 3, 4, 5), torch.float64)
    for others in itertools.product(IMAGE_LAYOUTS, repeat=2):
        given = [laid_out(each, layout) for each, layout in zip(operands, (of_input, *others), strict=True)]
        for reduction in ("mean", "none"):
            results = []
            for f, tensors in ((L, given), (F, given), (L, [each.contiguous() for each in given])):
                leaves = [each.detach().requires_grad_() for each in tensors]
                value = of(f, call, reduction=reduction)(*leaves)
                results.append([value.detach(), *torch.autograd.grad(value, leaves, upstream_of(value))])
            ours, torchs, contiguous = results
            same(ours, torchs)
            same(ours, contiguous)
            if "expanded columns" not in others:  # which torch's first step copies
                assert ours[0].stride() == torchs[0].stride(), (others, reduction)


# ---- gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_gradcheck_and_gradgradcheck(call, reduction):
    _, operands, _ = made(call, (2, 3), torch.float64)
    leaves = [each.requires_grad_() for each in operands]
    if call == "gaussian, full":  # whose bound is no matter to the gradient
        leaves[2] = (operands[2].detach() + 0.3).requires_grad_()
    assert gradcheck(of(L, call, reduction=reduction), leaves)
    assert gradgradcheck(of(L, call, reduction=reduction), leaves)


@ALL
def test_second_derivatives_are_torchs(call):
    _, operands, _ = made(call, (4, 3), torch.float32)
    results = []
    for functions in (L, F):
        leaves = [each.clone().requires_grad_() for each in operands]
        grads = torch.autograd.grad(of(functions, call)(*leaves), leaves, create_graph=True)
        penalty = sum((grad.square() * (1 + i)).sum() for i, grad in enumerate(grads))
        results.append([*(grad.detach() for grad in grads), *torch.autograd.grad(penalty, leaves, allow_unused=True)])
    same(*results)


@ALL
def test_a_batch_of_upstream_gradients(call):
    _, operands, _ = made(call, (3, 2), torch.float64)
    results = []
    for functions in (L, F):
        leaves = [each.clone().requires_grad_() for each in operands]
        value = of(functions, call, reduction="none")(*leaves)
        upstream = random(5, 3, 2, seed=9)
        results.append(torch.autograd.grad(value, leaves, upstream, is_grads_batched=True))
    same(*results)


@needs_extension
@ALL
def test_a_step_is_two_passes(call):
    _, operands, _ = made(call, (50, 40), torch.float32)
    leaves = [each.requires_grad_() for each in operands]
    with Recorder() as recorder:
        of(L, call)(*leaves).backward()
    passes = [op.removesuffix(".default") for op in recorder.seen if op.startswith("fusedloss")]
    name = "fusedloss." + ("margin_ranking" if call == "ranking" else "gaussian_nll")
    assert sorted(passes) == sorted([f"{name}_with_grad", f"{name}_backward", "fusedloss.scale_"])
    others = {op for op in recorder.seen if not op.startswith("fusedloss")}
    assert others <= {"aten.ones_like.default", "aten.clone.default", "aten.neg.default", "aten.detach.default"}


# ---- edges


@EVERY_DTYPE
def test_at_exactly_the_margin_the_slope_is_torchs(dtype):
    x = torch.tensor([0.5, -0.5, 0.0, 1.0, 0.25], dtype=dtype)
    y = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=dtype)
    for margin in (0.5, 0.0, -1.0):
        run = lambda f: value_and_grads(  # noqa: E731
            lambda *operands: f.margin_ranking_loss(*operands, margin, reduction="none"),  # noqa: B023
            x, torch.zeros_like(x), y,
        )  # fmt: skip
        same(run(L), run(F))


@pytest.mark.parametrize("eps", [1e-6, 0.5, 0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_variances_about_the_bound(dtype, eps):
    edges = [0.0, -0.0, 1e-7, 0.5, 0.25, 2.0, math.inf, math.nan, 1e-30]
    var, (x, t) = torch.tensor(edges, dtype=dtype), random(2, 9, seed=1).to(dtype)
    t[3] = x[3]
    run = lambda f: value_and_grads(  # noqa: E731
        lambda *operands: f.gaussian_nll_loss(*operands, eps=eps, reduction="none"), x, t, var
    )
    same(run(L), run(F))


NEGATIVE = (ValueError, "var has negative entry/entries")


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "foo"])
@pytest.mark.parametrize("where", [0, 8191, 8192, 29999])
@EVERY_DTYPE
@on_cpu_alone("on a GPU the loss is NaN and check() raises: gpu/")
def test_a_negative_variance_is_refused(dtype, where, reduction):
    _, (x, t, var), _ = made("gaussian", (30000,), dtype)
    var[where] = -1e-3
    for given in (var, var.expand(2, 30000).mT, var[:-1]):
        inputs = [each.expand(given.shape) if given.dim() == 1 and len(given) == 30000 else each for each in (x, t)]

        def run(f, leaf, inputs=inputs, given=given):
            return f.gaussian_nll_loss(inputs[0].clone().requires_grad_(leaf), inputs[1], given, reduction=reduction)

        for leaf in (False, True):
            ours, torchs = (outcome(lambda: run(f, leaf)) for f in (L, F))  # noqa: B023
            assert ours == torchs
            assert ours == NEGATIVE or not (given < 0).any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@on_cpu_alone("on a GPU the loss is NaN and check() raises: gpu/")
def test_a_negative_variance_of_rows(reduction):
    x = random(6, 50)
    for shape in ((6,), (6, 1), (1, 50)):
        var = torch.ones(shape, dtype=torch.float64)
        var.view(-1)[3] = -1.0
        with pytest.raises(ValueError, match="^var has negative entry/entries$"):
            L.gaussian_nll_loss(x, x.flip(0), var, reduction=reduction)


def test_a_negative_variance_that_nobody_is_told_of_is_nan():
    x, t, var = numbers("gaussian", (5, 3), (5, 3), (5, 3))
    var[2, 1] = -1.0
    losses = torch.func.vmap(lambda *operands: L.gaussian_nll_loss(*operands, reduction="none"))(x, t, var)
    assert losses.isnan().nonzero().tolist() == [[2, 1]]
    good = torch.where(var < 0, 1.0, var)
    same(losses[losses.isfinite()], F.gaussian_nll_loss(x, t, good, reduction="none")[losses.isfinite()])


@pytest.mark.parametrize(
    "var", [0.5, 2.0, 0.0, 1e-9, -1.0, -0.0, math.nan, math.inf, 1, True, None, "1", [1.0]], ids=str
)
@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (0,)], ids=str)
@not_under_a_default_device
def test_a_variance_that_is_no_tensor(shape, var):
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        x, t, _ = made("gaussian", shape, dtype)[1]
        run = lambda f: f.gaussian_nll_loss(x, t, var, reduction="none")  # noqa: B023, E731
        ours, torchs = (warned(lambda: run(f))[0] for f in (L, F))  # noqa: B023
        if isinstance(torchs, Tensor):
            same(ours, torchs, **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}))
        else:
            assert ours == torchs
    x, t = numbers("gaussian", (3, 2), (3, 2), (3, 2))[:2]
    if isinstance(var, float) and not var < 0:
        same(*(value_and_grads(lambda x, t: f.gaussian_nll_loss(x, t, var), x, t) for f in (L, F)))  # noqa: B023
        assert fusedloss._library.extension is None or fused("gaussian", x, t, var)


# ---- autocast


@needs_extension
@on_cpu_alone("on a GPU a bfloat16 gradient is made in forward and rounded again by its upstream gradient")
def test_autocast_gives_float32_no_less_exact_than_torchs():
    for dtype, reduction in itertools.product(HALVES, REDUCTIONS):
        _, operands, _ = made("ranking", (40, 30), dtype)
        exact = value_and_grads(of(F, "ranking", reduction=reduction), *(each.double() for each in operands))
        with autocast(dtype), Recorder() as recorder:
            ours = value_and_grads(of(L, "ranking", reduction=reduction), *operands)
            assert fused("ranking", *operands, reduction=reduction)
        assert not any("_to_copy" in op for op in recorder.seen)
        with autocast(dtype):
            torchs = value_and_grads(of(F, "ranking", reduction=reduction), *operands)
        assert ours[0].dtype == torchs[0].dtype == torch.float32
        for got, of_torch, expected in zip(ours, torchs, exact, strict=True):
            assert got.dtype == of_torch.dtype
            hair = 8 * 2**-24 if got.dtype == torch.float32 else 0.01 * torch.finfo(dtype).eps
            assert error(got, expected) <= error(of_torch, expected) + hair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@ALL
def test_autocast_gives_torchs_dtypes(call, dtype):
    others = [dtype, torch.float32, torch.float64, torch.bfloat16, torch.int64]
    for of_target, of_third in itertools.product(others, repeat=2):
        _, operands, _ = made(call, (4, 3), dtype, of_target, of_third)
        with autocast(torch.bfloat16):
            ours, torchs = (outcome(lambda: of(f, call, reduction="none")(*operands)) for f in (L, F))  # noqa: B023
        assert ours == torchs, (of_target, of_third)


def test_integer_labels_under_autocast():
    x, t = torch.tensor([1.0, 2.0]).bfloat16(), torch.zeros(2).bfloat16()
    for labels in (torch.tensor([1000001, -1000003]), torch.tensor([1, -1], dtype=torch.int16)):
        with autocast(torch.bfloat16):
            same(*(f.margin_ranking_loss(x, t, labels, 3.0, reduction="none") for f in (L, F)))


# ---- arguments


@pytest.mark.parametrize("size_average, reduce", [*itertools.product([None, True, False], repeat=2)][1:])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@not_under_a_default_device
def test_size_average_and_reduce(size_average, reduce, reduction):
    operands = numbers("ranking", (3, 2), (3, 2), (3, 2))
    given = {"size_average": size_average, "reduce": reduce, "reduction": reduction}
    for make in (
        lambda of, modules: of.margin_ranking_loss(*operands, **given),
        lambda of, modules: modules.MarginRankingLoss(0.5, **given)(*operands),
    ):
        ours, torchs = (warned(lambda: make(*each)) for each in ((L, fusedloss), (F, nn)))  # noqa: B023
        same(ours[0], torchs[0])
        assert [each[:2] for each in ours[1]] == [each[:2] for each in torchs[1]] != []


@pytest.mark.parametrize("reduction", ["foo", "elementwise_mean", "Mean", "batchmean", None, 1])
@ALL
@not_under_a_default_device
def test_unusual_reductions(call, reduction):
    function, operands, options = made(call, (3, 2), torch.float32)
    assert_reduction_as_in_torch(function, MODULES[function], operands, options, reduction)


ODD = [1, True, "1", None, 1j, torch.tensor(0.5, device="cpu"), math.inf, -math.inf, math.nan, 0.0, -1.0, 1e30, 10**400]


@pytest.mark.parametrize("parameter", ODD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("call, name", [("ranking", "margin"), ("gaussian", "eps"), ("gaussian", "full")])
@not_under_a_default_device
def test_parameters(call, name, parameter):
    function, operands, options = made(call, (3, 2), torch.float32)
    for reduction in ("mean", "none"):
        given = options | {name: parameter, "reduction": reduction}
        ours, torchs = (warned(lambda: getattr(f, function)(*operands, **given)) for f in (L, F))  # noqa: B023
        if isinstance(torchs[0], Tensor):
            same(ours, torchs)
        else:
            assert ours == torchs


@EVERY_FUNCTION
def test_what_is_no_tensor(function):
    one = torch.ones(2)
    for operands in itertools.product((one, [1.0, 1.0], 1.0, None), repeat=3):
        ours, torchs = (outcome(lambda: getattr(f, function)(*operands)) for f in (L, F))  # noqa: B023
        assert ours == torchs, operands


@EVERY_FUNCTION
def test_the_signature_is_torchs(function):
    ours, torchs = (inspect.signature(getattr(f, function)).parameters for f in (L, F))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in torchs.values()
    ]


# ---- modules

CONSTRUCTED: dict[str, tuple[str, Any]] = {
    "ranking": ("ranking", lambda of: of.MarginRankingLoss()),
    "ranking, positional": ("ranking", lambda of: of.MarginRankingLoss(0.5, None, None, "sum")),
    "gaussian": ("gaussian", lambda of: of.GaussianNLLLoss()),
    "gaussian, full": ("gaussian", lambda of: of.GaussianNLLLoss(full=True, eps=0.2, reduction="none")),
}


@pytest.mark.parametrize("name", CONSTRUCTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_is_torchs(name):
    call, make = CONSTRUCTED[name]
    ours, native = make(fusedloss), make(nn)
    assert isinstance(ours, type(native)) and type(ours).__name__ == type(native).__name__
    assert repr(ours) == repr(native) and set(vars(native)) == set(vars(ours))
    assert list(ours.state_dict()) == list(native.state_dict())
    operands = numbers(call, (3, 2), (3, 2), (3, 2))
    expected = value_and_grads(native, *operands)
    for each in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(each) is type(ours)
        same(value_and_grads(each, *operands), expected)
    if "ranking" in name:  # TorchScript does not compile torch's own function of the other one
        same(torch.jit.script(ours)(*operands), expected[0])
    for module in (ours, native):
        module.reduction = "foo"
    assert outcome(lambda: ours(*operands)) == outcome(lambda: native(*operands))


# ---- under torch.compile


@needs_extension
@pytest.mark.deep("every form of these losses compiled; compiled/ compiled one of each")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@ALL
def test_compile_gives_eagers_results(call, reduction):
    for shapes in (((150, 120),) * 3, ((150, 120), (150, 120), (150, 1))):
        operands = [each.float() for each in numbers(call, *shapes)]
        run = of(L, call, reduction=reduction)
        compiled, ops = compiled_with_ops(run)
        same(value_and_grads(compiled, *operands), value_and_grads(run, *operands))
        assert any(op.startswith("fusedloss.") for op in ops) == (call != "ranking" or operands[0].is_cuda)
        given = [
            laid_out(each, layout)
            for each, layout in zip(operands, ("transposed", "contiguous", "contiguous"), strict=True)
        ]  # noqa: E501
        same(compiled(*given), run(*given), check_stride=True)


@needs_extension
@on_cpu_alone("on a GPU the loss is NaN and check() raises: gpu/")
@pytest.mark.deep("a compiled loss that raises; eager ones do above")
def test_a_compiled_loss_refuses_a_negative_variance():
    x, t, var = (each.float() for each in numbers("gaussian", (150, 120), (150, 120), (150, 120)))
    compiled = torch.compile(fusedloss.GaussianNLLLoss(), fullgraph=True)
    same(compiled(x, t, var), F.gaussian_nll_loss(x, t, var))
    var[3, 4] = -1
    with pytest.raises(ValueError, match="var has negative entry/entries"):
        compiled(x, t, var)
