"""What a linear loss refuses: in torch's words where torch refuses it too, and before anything is computed."""

import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from compare import warned
from linear_calls import indices, operands, probabilities
from marks import needs_extension, on_cpu_alone

import fusedloss
import fusedloss.functional as L
from fusedloss.linear import _passes

needs_torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
CHUNKS = pytest.mark.parametrize("chunk_rows", [None, 2])

INPUT, HEAD, BIAS = (each.detach().cpu() for each in operands((6,), features=4, classes=5))
TARGET = torch.tensor([0, 1, 2, 3, 4, 0], device="cpu")
OF_POSITIONS = torch.ones(5, 2, 4, device="cpu")
TORCHS: dict[str, tuple[Any, ...]] = {
    "an input without dimensions": (INPUT[0, 0], HEAD, TARGET),
    "a head of one dimension": (INPUT, HEAD[0], TARGET),
    "other features": (INPUT, HEAD[:, :3], TARGET),
    "a bias of another shape": (INPUT, HEAD, TARGET, {"linear_bias": BIAS[:4]}),
    "one row beside positions": (INPUT[0], OF_POSITIONS, TARGET[:2]),
    "fewer targets": (INPUT, HEAD, TARGET[:5]),
    "a target with a dimension more": (INPUT, HEAD, TARGET[:, None]),
    "a target without positions": (INPUT, OF_POSITIONS, TARGET),
    "probabilities of fewer classes": (INPUT, HEAD, torch.ones(6, 4, device="cpu")),
    "an ignore_index beside probabilities": (INPUT, HEAD, torch.ones(6, 5, device="cpu"), {"ignore_index": -100}),
    "int32": (INPUT, HEAD, TARGET.int()),
    "a class too many": (INPUT, HEAD, TARGET + 1),
    "a negative class": (INPUT, HEAD, TARGET - 1),
    "weights of other classes": (INPUT, HEAD, TARGET, {"weight": BIAS[:4]}),
    "weights of another dtype": (INPUT, HEAD, TARGET, {"weight": BIAS.double()}),
    "a head of another dtype": (INPUT, HEAD.double(), TARGET),
    "a bias of another dtype": (INPUT, HEAD, TARGET, {"linear_bias": BIAS.double()}),
    "integers": (INPUT.long(), HEAD.long(), TARGET),
    "complex numbers": (INPUT.cfloat(), HEAD.cfloat(), TARGET),
    "a smoothing above 1": (INPUT, HEAD, TARGET, {"label_smoothing": 1.5}),
    "a smoothing that is a str": (INPUT, HEAD, TARGET, {"label_smoothing": "0.1"}),
    "a reduction that there is not": (INPUT, HEAD, TARGET, {"reduction": "average"}),
}


def outcome(function: Callable[..., Any], operands: tuple[Any, ...], **more: Any) -> Any:
    *tensors, options = operands if isinstance(operands[-1], dict) else (*operands, {})
    return warned(lambda: function(*tensors, **options, **more))[0]


@needs_torchs
@on_cpu_alone("a GPU's words for labels and dtypes are its own; gpu/test_linear_gpu.py has those for labels")
@CHUNKS
@pytest.mark.parametrize("call", TORCHS)
def test_torchs_errors(call, chunk_rows):
    expected = outcome(F.linear_cross_entropy, TORCHS[call])
    assert isinstance(expected, tuple)
    if call == "an input without dimensions":  # torch takes 1 or 2
        expected = (RuntimeError, "expected input with dimensionality at least 1, got 0")
    assert outcome(L.linear_cross_entropy, TORCHS[call], chunk_rows=chunk_rows) == expected


@CHUNKS
@pytest.mark.parametrize("function", ["linear_focal_loss", "linear_log_probs"])
def test_the_others_have_the_errors_of_the_head(function, chunk_rows):
    for call in list(TORCHS)[:5]:
        expected = outcome(L.linear_cross_entropy, TORCHS[call])
        assert outcome(getattr(L, function), TORCHS[call], chunk_rows=chunk_rows) == expected
    with pytest.raises((ValueError, RuntimeError), match="expected class indices|multi-target not supported"):
        getattr(L, function)(INPUT, HEAD, torch.rand(6, 5, device="cpu"), chunk_rows=chunk_rows)
    got = outcome(getattr(L, function), TORCHS["a class too many"], chunk_rows=chunk_rows)
    assert got == (IndexError, "Target 5 is out of bounds.")


@CHUNKS
def test_inputs_of_more_dimensions_whose_target_does_not_fit(chunk_rows):
    input = INPUT.reshape(2, 3, 4)
    for target in (TARGET, torch.rand(6, 5, device="cpu"), 3):
        got = outcome(L.linear_cross_entropy, (input, HEAD, target), chunk_rows=chunk_rows)
        assert got == (RuntimeError, "expected input with dimensionality 1 or 2, got 3")
    wanted = "expected a target of class indices of shape (2, 3) or of probabilities of shape (2, 3, 5), got "
    for target in (TARGET.reshape(3, 2), torch.rand(2, 4, 5, device="cpu")):
        got = outcome(L.linear_cross_entropy, (input, HEAD, target), chunk_rows=chunk_rows)
        assert got == (ValueError, wanted + str(tuple(target.shape)))


@needs_extension
@on_cpu_alone("a GPU tells it later: gpu/test_linear_gpu.py")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("label", [11, -1, 2**40])
def test_a_label_in_the_last_chunk_is_found_before_the_first_is_computed(label, options):
    (input, weight, _), target = operands(), indices()
    target[-1] = label
    for function in (L.linear_cross_entropy, L.linear_focal_loss):
        if "return_lse" in options and function is L.linear_focal_loss:
            continue
        with (
            patch.object(_passes.Logits, "of", side_effect=AssertionError("computed")),
            pytest.raises(IndexError, match=f"Target {label} is out of bounds"),
        ):
            function(input, weight, target, chunk_rows=3, **options)
    with pytest.raises(IndexError, match="Target 200 is out of bounds"):
        L.linear_cross_entropy(input, weight, target.fill_(200).byte(), chunk_rows=3, **options)


NUMBER = "must be float, not"
OURS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no rows": ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
    "half a row": ({"chunk_rows": 1.5}, TypeError, "chunk_rows must be an int, not float"),
    "true rows": ({"chunk_rows": True}, TypeError, "chunk_rows must be an int, not bool"),
    "shift back": ({"shift": -1}, ValueError, "shift must be at least 0, got -1"),
    "shift all": ({"shift": 6}, ValueError, "shift must be below the length 6 of the sequences, got 6"),
    "shift of a float": ({"shift": 1.0}, TypeError, "shift must be an int, not float"),
    "normalizer of a sum": (
        {"normalizer": 3.0, "reduction": "sum"}, ValueError,
        "normalizer needs reduction='mean', whose sum it divides, got 'sum'",
    ),
    "normalizer of a str": ({"normalizer": "3"}, TypeError, f"argument 'normalizer' {NUMBER} str"),
    "normalizers": (
        {"normalizer": torch.ones(2)}, TypeError,
        rf"argument 'normalizer' {NUMBER} a tensor of torch.float32 and shape \(2,\)",
    ),
    "logit_scale of a str": ({"logit_scale": "1"}, TypeError, f"argument 'logit_scale' {NUMBER} str"),
    "logit_scale of None": ({"logit_scale": None}, TypeError, f"argument 'logit_scale' {NUMBER} NoneType"),
    "z_loss of a str": ({"z_loss": "1"}, TypeError, f"argument 'z_loss' {NUMBER} str"),
    "negative z_loss": ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0, got -1.0"),
    "softcap of a str": ({"softcap": "1"}, TypeError, f"argument 'softcap' {NUMBER} str"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
    "all_ignored": ({"all_ignored": "one"}, ValueError, """all_ignored must be "nan" or "zero", got 'one'"""),
    "out_dtype": ({"out_dtype": torch.int32}, ValueError, "out_dtype must be a floating point type"),
    "weights of fewer rows": (
        {"sample_weight": torch.ones(5)}, ValueError,
        r"sample_weight must be of the rows' shape \(6,\), got shape \(5,\)",
    ),
    "weights of integers": (
        {"sample_weight": torch.ones(6).long()}, ValueError, "sample_weight must be of a floating point dtype",
    ),
    "a mask of fewer rows": ({"ignore_index": torch.ones(5).bool()}, ValueError, r"a mask of ignored rows must be of"),
    "ignored floats": ({"ignore_index": [1.0]}, TypeError, "argument 'ignore_index' must hold ints, got float"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    "gamma": ({"gamma": -1.0}, ValueError, "gamma must be at least 0, got -1.0"),
    "gamma of a str": ({"gamma": "1"}, TypeError, f"argument 'gamma' {NUMBER} str"),
    "alpha of other classes": (
        {"alpha": [1.0]}, ValueError, r"alpha must hold a weight for each of 5 classes, got shape \(1,\)"
    ),
}  # fmt: skip


@CHUNKS
@pytest.mark.parametrize("case", OURS)
def test_our_errors_say_what_was_expected_and_what_came(case, chunk_rows):
    options, error, message = OURS[case]
    options = {
        name: each.to(torch.get_default_device()) if isinstance(each, torch.Tensor) else each
        for name, each in options.items()
    }
    input, head, target = (each.to(torch.get_default_device()) for each in (INPUT, HEAD, TARGET))
    ran = 0
    for function in (L.linear_cross_entropy, L.linear_focal_loss, L.linear_log_probs):
        takes = set(inspect.signature(function).parameters)
        if function is L.linear_log_probs:
            takes.remove("ignore_index")  # one int, as log_probs
        if options.keys() <= takes:
            with pytest.raises(error, match=message):
                function(input, head, target, **{"chunk_rows": chunk_rows, **options})
            ran += 1
    assert ran


def test_a_shift_needs_a_sequence():
    for function in (L.linear_cross_entropy, L.linear_focal_loss, L.linear_log_probs):
        with pytest.raises(ValueError, match=r"a shift needs a sequence, got an input of shape \(4,\)"):
            function(INPUT[0], HEAD, TARGET[0], shift=1)
        for target in (TARGET[0], TARGET[:3]):
            with pytest.raises((ValueError, RuntimeError)):
                function(INPUT, HEAD, target, shift=1)


class DTensor(torch.Tensor):
    """By its name, as the package knows it, so that a build of torch without distribution runs this."""

    placements = ("Shard(dim=0)",)
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_a_sharded_head_is_told_what_to_do():
    for position, name in enumerate(("input", "linear_weight", "linear_bias")):
        given = [INPUT, HEAD, BIAS]
        given[position] = given[position].as_subclass(DTensor)
        for function in (L.linear_cross_entropy, L.linear_focal_loss, L.linear_log_probs):
            if function is L.linear_cross_entropy and name == "linear_weight":
                continue  # which it takes: see tests/parallel/linear_ranks.py
            words = rf"{function.__name__}: expected {name} to be whole on every rank, .*Shard.*{name}.full_tensor"
            with pytest.raises(RuntimeError, match=words):
                function(given[0], given[1], TARGET, linear_bias=given[2])


@needs_extension
@CHUNKS
def test_numbers_of_other_types_count(chunk_rows):
    from fractions import Fraction

    input, head, target = operands((6,), torch.float64)[0], operands((6,), torch.float64)[1], indices((6,))
    for name, functions in {
        "z_loss": [L.linear_cross_entropy],
        "softcap": [L.linear_cross_entropy],
        "logit_scale": [L.linear_cross_entropy, L.linear_focal_loss, L.linear_log_probs],
        "normalizer": [L.linear_cross_entropy, L.linear_focal_loss],
        "gamma": [L.linear_focal_loss],
        "temperature": [L.linear_log_probs],
    }.items():
        for function in functions:
            run = lambda value: function(input, head, target, chunk_rows=chunk_rows, **{name: value})  # noqa: B023, E731
            expected = run(0.75)
            for value in (Fraction(3, 4), torch.tensor(0.75), torch.tensor([0.75])):
                torch.testing.assert_close(run(value), expected)
            learned = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(run, learned, fast_mode=True)


@needs_extension
@on_cpu_alone("names the CPU")
def test_calls_are_explained():
    (input, head, _), target = operands((2000,), features=8, classes=3000), indices((2000,), classes=3000)
    isa = fusedloss._route.extension.cpu_isa()
    told = lambda function=L.linear_cross_entropy, **options: fusedloss.explain(  # noqa: E731
        function, *options.pop("operands", (input, head, target)), **options
    )
    assert told() == f"fused: cpu {isa}, 4 chunks of 500 rows, 5.7 MiB beside the gradients"
    assert told(chunk_rows=2000) == f"fused: cpu {isa}, 1 chunk of 2000 rows, 22.9 MiB beside the gradients"
    assert told(chunk_rows=5000) == told(chunk_rows=2000)
    assert told(chunk_rows=64).startswith(f"fused: cpu {isa}, 32 chunks of 64 rows, 0.7 MiB")
    assert told(L.linear_log_probs, return_entropy=True) == told(L.linear_focal_loss) == told()
    module = fusedloss.LinearCrossEntropyLoss.from_linear(torch.nn.Linear(8, 3000))
    assert told(module, operands=(input, target)) == told()
    few = (input[:4], head[:30], target[:4].clamp_max(29))
    assert told(operands=few) == f"fused: cpu {isa}, rows of 30"
    assert told(operands=few, chunk_rows=2).startswith(f"fused: cpu {isa}, 2 chunks of 2 rows")
    for reason, options in {
        "a logit_scale that is a tensor": {"logit_scale": torch.tensor(1.0)},
        "the weight requires a gradient": {"weight": torch.ones(3000, requires_grad=True)},
        "a normalizer that requires a gradient": {"normalizer": torch.tensor(1.0, requires_grad=True)},
        "a parameter that is no number": {"z_loss": torch.tensor(1.0)},
    }.items():
        assert told(**options) == f"native: {reason}"
    for reason, given in {
        "an input and a head of different dtypes": (input, head.bfloat16(), target),
        "the target holds no class indices in int64 or uint8": (input, head, target.int()),
        "the logits are empty or a single number": (input[:0], head, target[:0]),
        "the probabilities require a gradient": (
            input[:9], head, probabilities((9,), classes=3000).float().requires_grad_(),
        ),
    }.items():  # fmt: skip
        assert told(operands=given) == f"native: {reason}"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, input)
        assert told(operands=(dual, head, target)) == "native: forward-mode AD"
