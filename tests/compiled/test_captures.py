"""What the kernels own is stated twice: in C++ for real calls, in fusedloss/_captures.py for graphs that are being
captured. Here the two are asked the same thousands of calls and must give the same answer in the same words."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusedloss
import fusedloss.functional as L
from fusedloss import _captures, _route
from fusedloss._library import extension

if extension is None:
    pytest.skip("no extension here; tests/contract/test_fallback.py covers the native path", allow_module_level=True)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.uint8, torch.int32, torch.bool, torch.complex64]
SHAPES = [(), (4,), (3, 4), (4, 1), (3, 1), (0, 4), (2, 4, 3), (2, 4, 3, 2)]
CALLS = 3000  # of each loss: 2 s


def tensor(chance: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    made = torch.zeros(shape, dtype=dtype, device="meta" if chance.random() < 0.02 else "cpu")
    if chance.random() < 0.02 and made.device.type == "cpu":
        made = made.to_sparse()
    if made.dtype.is_floating_point and chance.random() < 0.1:
        made.requires_grad_()
    return made


def near(chance: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same shape, its rows, or any other."""
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    return chance.choice([shape, shape, rows, rows, chance.choice(SHAPES)])


def number(chance: random.Random, least: float, most: float, above_least: bool) -> float:
    inside = [value for value in (0.5, 1.0, 2.0) if least < value <= most] or [most]
    return chance.choice([*inside, *inside, *inside, least, -1.0, 3.0, float("nan"), float("inf")])


def one_call(chance: random.Random, name: str) -> tuple[list[Any], dict[str, Any], bool]:
    """The arguments of a call, mostly sensible, and whether autocast is on."""
    known = extension.losses[name]
    shape = chance.choice(SHAPES)
    dtype = chance.choice(FLOATS if chance.random() < 0.9 else DTYPES)
    indices = known.family == "softmax" and not known.traits.soft
    options: dict[str, Any] = {}
    if known.family == "pointwise" and chance.random() < 0.4:
        options["ignore_index"] = -100
        indices = True
    of_target = torch.int64 if indices else dtype
    if chance.random() < 0.3:
        of_target = chance.choice(DTYPES)
    target = tensor(chance, near(chance, shape), of_target)
    weight = None
    if chance.random() < 0.5:
        of_weight = dtype if chance.random() < 0.6 else chance.choice(DTYPES)
        classes = shape[1:2] if len(shape) > 1 else shape
        weight = tensor(chance, chance.choice([classes, shape, near(chance, shape)]), of_weight)
    if known.family == "pointwise" and chance.random() < (0.8 if known.traits.has_third_slope else 0.2):
        of_third = dtype if chance.random() < 0.6 else chance.choice(DTYPES)
        options["third"] = tensor(chance, near(chance, shape), of_third)
    if known.family == "softmax":
        options["wide"] = chance.random() < 0.3
        options["second"] = chance.random() < 0.3
        if chance.random() < 0.4:
            of_weight = chance.choice(FLOATS if chance.random() < 0.8 else DTYPES)
            rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
            options["sample_weight"] = tensor(chance, chance.choice([rows, rows, near(chance, shape)]), of_weight)
    reduction = chance.choice(["mean", "sum", "none"]) if chance.random() < 0.95 else chance.choice(["avg", None])
    params = [number(chance, *limits) for limits in known.traits.params]
    if chance.random() < 0.03:
        params = [*params, *[0.0] * 9]
    if chance.random() < 0.02:
        params = [*params[:-1], chance.choice(["1", 10**400, None])]
    indices = [-100, 0, 3, -100, 0, 3, -100, 0, 3, True, 1.5, 2**63, -(2**63) - 1]
    middle = [chance.choice(indices)] if known.family == "softmax" else []
    if "ignore_index" in options:
        options["ignore_index"] = chance.choice(indices)
    return [tensor(chance, shape, dtype), target, weight, reduction, *middle, *params], options, chance.random() < 0.2


def one_call_of_rows(chance: random.Random, name: str) -> tuple[list[Any], dict[str, Any], bool]:
    """The same of a loss of row sums."""
    traits = extension.losses[name].traits
    shape = chance.choice([(4,), (3, 4), (3, 4), (3, 4), (1, 4), (4, 1), (2, 4, 3), *SHAPES])
    dtype = chance.choice(FLOATS if chance.random() < 0.9 else DTYPES)

    def another(likely: float, shapes: list[tuple[int, ...]]) -> torch.Tensor:
        other = dtype if chance.random() < likely else chance.choice(DTYPES)
        return tensor(chance, chance.choice(shapes), other)

    count = traits.operands if chance.random() < 0.9 else chance.choice([1, 2, 3])
    likely = [shape] * 12 + [near(chance, shape), chance.choice(SHAPES)]
    operands = [another(0.95, likely) for _ in range(count)]
    target = weight = None
    if (traits.takes_labels or traits.takes_class) != (chance.random() < 0.05):
        target = another(0.5, [shape[:-1]] * 6 + [(1,), (), near(chance, shape)])
        if traits.takes_class and chance.random() < 0.8:
            target = target.to_dense().long() if target.is_sparse else target.long()
    if chance.random() < (0.4 if traits.takes_class else 0.05):
        weight = another(0.7, [shape[-1:]] * 6 + [near(chance, shape)])
    reduction = chance.choice(["mean", "sum", "none"]) if chance.random() < 0.95 else chance.choice(["avg", None])
    params = [number(chance, *limits) for limits in traits.params]
    if chance.random() < 0.03:
        params = [*params[:-1], chance.choice(["1", 10**400, None])]
    call = [*operands, None, None][:3]
    return [*call, target, weight, reduction, *params], {}, chance.random() < 0.2


def by_cpp(name: str, arguments: list[Any], options: dict[str, Any]) -> str | None:
    path: str = extension.losses[name].explain(*arguments, **options)
    return path.removeprefix("native: ") if path.startswith("native: ") else None


def by_captures(name: str, arguments: list[Any], options: dict[str, Any]) -> str | None:
    known = extension.losses[name]
    if known.family == "row_sums":
        return _captures.row_sums(known.traits, *arguments[:6], arguments[6:])
    input, target, weight, reduction, *rest = arguments
    if known.family == "pointwise":
        return _captures.pointwise(known.traits, input, target, weight, reduction, rest, **options)
    return _captures.softmax(known.traits, input, target, weight, reduction, rest[0], rest[1:], **options)


@pytest.mark.parametrize("name", extension.losses)
def test_both_statements_give_the_same_answer_in_the_same_words(name):
    chance = random.Random(name)
    seen = set()
    for _ in range(CALLS):
        make = one_call_of_rows if extension.losses[name].family == "row_sums" else one_call
        arguments, options, autocast = make(chance, name)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            real, captured = by_cpp(name, arguments, options), by_captures(name, arguments, options)
        assert real == captured, (arguments, options, autocast)
        seen.add(real)
    assert None in seen and len(seen) > 8, seen  # the grid meets calls of both kinds, and many reasons


# What torch rejects, as (ours, torch's, arguments, options): under torch.compile as in eager.
X, P, Y = torch.randn(4, 3), torch.randn(4, 3).softmax(1), torch.tensor([0, 2, 1, 0])
REJECTED = {
    "smoothing above 1": ("cross_entropy", (X, Y), {"label_smoothing": 2.0}),
    "smoothing that is no number": ("cross_entropy", (X, Y), {"label_smoothing": "0.1"}),
    "an ignore_index beyond 64 bits": ("nll_loss", (X, Y), {"ignore_index": 2**63}),
    "an ignore_index that is a bool": ("cross_entropy", (X, Y), {"ignore_index": True}),
    "probabilities beside ignore_index": ("cross_entropy", (X, P), {"ignore_index": 1}),
    "targets of another batch": ("cross_entropy", (X, Y[:2]), {}),
    "a weight of another length": ("cross_entropy", (X, Y, torch.ones(4)), {}),
    "class indices in float": ("nll_loss", (X, Y.float()), {}),
    "an unknown reduction": ("cross_entropy", (X, Y), {"reduction": "avg"}),
    "delta below 0": ("huber_loss", (X, X), {"delta": -1.0}),
    "beta below 0": ("smooth_l1_loss", (X, X), {"beta": -1.0}),
    "sizes that do not broadcast": ("mse_loss", (X, X[:3]), {}),
    "a binary target of another size": ("binary_cross_entropy_with_logits", (X, P[:, 0]), {}),
    "an integer binary target": ("binary_cross_entropy", (P, Y.unsqueeze(1).expand(4, 3)), {}),
    "an unknown reduction of elements": ("l1_loss", (X, X), {"reduction": "avg"}),
}


def rejection(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: B017
        function(*arguments, **options)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("case", REJECTED)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_compiled_call_is_rejected_with_torchs_type_and_words(case):
    name, arguments, options = REJECTED[case]
    ours, torchs = getattr(L, name), getattr(F, name)
    assert rejection(ours, arguments, options) == rejection(torchs, arguments, options)
    torch._dynamo.reset()

    def compiled(function: Any) -> tuple[type, str]:
        run = torch.compile(lambda *a: function(*a, **options), backend="eager")
        kind, text = rejection(run, arguments, {})
        # The compiler adds which line of whose code it traced; what it was told stands before that.
        return kind, text.split("from user code")[0].split("Explanation")[0]

    got, expected = compiled(ours), compiled(torchs)
    words = rejection(torchs, arguments, options)[1]
    assert got[0] == expected[0]
    assert words in got[1] or got[1] == expected[1], got[1]


@pytest.mark.parametrize("strict", [False, True])
def test_integer_targets_of_mse_are_captured_as_they_run(strict):
    x, t = torch.randn(4, 3), torch.arange(12).reshape(4, 3)
    program = torch.export.export(fusedloss.MSELoss(), (x, t), strict=strict)
    assert "fusedloss" in str(program.graph)
    torch.testing.assert_close(program.module()(x, t), F.mse_loss(x, t))
    torch.testing.assert_close(torch.compile(L.mse_loss, backend="aot_eager")(x, t), F.mse_loss(x, t))


def test_every_declared_loss_is_known_to_the_extension():
    assert {*_route.LOSSES, *_route.ROW_SUMS} <= set(extension.losses)
