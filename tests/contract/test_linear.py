"""The linear losses: from hidden states and a head to loss and gradients, in chunks, beside whole logits in float64."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import upstreams
from losses import DTYPES
from marks import needs_extension, on_cpu_alone
from observe import peak_bytes
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import fusedloss
import fusedloss.functional as L

ROWS, FEATURES, CLASSES = 23, 8, 11
# Of a result, relative to its norm. A chunk's sum and a product are each rounded once; float16 scales keep more digits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"z_loss": 1e-2, "softcap": 5.0},
    "scaled": {"logit_scale": 0.5},
    "lse": {"return_lse": True},
    "weight": {"weight": torch.linspace(0.5, 2, CLASSES, device="cpu")},
    "backward": {"grad_in_forward": False},
    "wide": {"out_dtype": torch.float32},
}


def data(dtype: torch.dtype, positions: tuple[int, ...] = (), rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(device, dtype).requires_grad_()

    target = torch.randint(CLASSES, (rows, *positions), generator=generator, device="cpu")
    target.view(-1)[1::4] = -100
    return [
        random(rows, FEATURES),
        random(CLASSES, *positions, FEATURES),
        random(CLASSES, *positions),
        target.to(device),
    ]


def soft_target(target: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    shape = (target.shape[0], CLASSES, *target.shape[1:])
    return torch.randn(shape, generator=generator, device="cpu").softmax(1).to(target.device, dtype)


def exact(
    input: Tensor, head: Tensor, bias: Tensor, target: Tensor, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients from whole logits in float64; L.cross_entropy has tests of its own."""
    leaves = [each.detach().double().requires_grad_() for each in (input, head, bias)]
    logits = F.linear(leaves[0], leaves[1].flatten(0, -2), leaves[2].flatten()) * options.pop("logit_scale", 1.0)
    logits = logits.reshape(len(input), *head.shape[:-1])
    options = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    for ours in ("grad_in_forward", "out_dtype", "chunk_rows"):
        options.pop(ours, None)
    results = L.cross_entropy(logits, target.double() if target.is_floating_point() else target, **options)
    listed = list(results) if isinstance(results, tuple) else [results]
    return listed, list(torch.autograd.grad(listed, leaves, [each.double() for each in upstreams(*listed)]))


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm() + 1e-12


@pytest.mark.thinned
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("positions", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_are_those_of_whole_logits(dtype, name, positions, reduction, soft, chunk_rows):
    input, head, bias, target = data(dtype, positions)
    options = dict(OPTIONS[name])
    if "weight" in options:
        options["weight"] = options["weight"].to(input.device, dtype)
    if options.get("out_dtype") and dtype == torch.float64:
        options = {}
    target = soft_target(target, dtype) if soft else target
    results = L.linear_cross_entropy(
        input, head, target, linear_bias=bias, reduction=reduction, chunk_rows=chunk_rows, **options
    )
    listed = list(results) if isinstance(results, tuple) else [results]
    given = upstreams(*listed)
    first = torch.autograd.grad(listed, (input, head, bias), given, retain_graph=True)
    second = torch.autograd.grad(listed, (input, head, bias), given)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    expected, gradients = exact(input, head, bias, target, reduction=reduction, **options)
    assert_near([each.detach() for each in listed], [each.detach() for each in expected], TOLERANCE[dtype])
    assert_near(list(first), gradients, TOLERANCE[dtype])
    assert [each.dtype for each in first] == [dtype] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", [3, [-100, 2], "mask"], ids=str)
def test_rows_have_weights_and_are_ignored_in_every_way(ignored, dtype):
    input, head, bias, target = data(dtype)
    weight = (torch.arange(ROWS, device=target.device) % 3).to(dtype)
    target = torch.where(target < 0, 3, target)
    index = torch.arange(ROWS, device=target.device) % 5 == 0 if ignored == "mask" else ignored
    options: dict[str, Any] = {"ignore_index": index, "sample_weight": weight}
    value = L.linear_cross_entropy(input, head, target, linear_bias=bias, chunk_rows=4, **options)
    got = torch.autograd.grad(value, (input, head, bias), upstreams(value))
    expected, gradients = exact(input, head, bias, target, ignore_index=index, sample_weight=weight)
    assert_near([value.detach(), *got], [expected[0].detach(), *gradients], TOLERANCE[dtype])


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
def test_inputs_of_any_rank_and_the_shift_to_the_next_token(positions):
    input, head, bias, target = data(torch.float64, positions, rows=24)
    shaped, labels = input.reshape(2, 3, 4, FEATURES), target.reshape(2, 3, 4, *positions)
    for shift in (0, 1, 3):
        moved = [shaped[:, :, : 4 - shift].flatten(0, 2), labels[:, :, shift:].flatten(0, 2)]
        logits = F.linear(moved[0], head.flatten(0, -2), bias.flatten()).reshape(-1, *head.shape[:-1])
        expected = F.cross_entropy(logits, moved[1], reduction="none")
        options = {"linear_bias": bias, "shift": shift, "chunk_rows": 5}
        rows = L.linear_cross_entropy(shaped, head, labels, reduction="none", **options)
        assert rows.shape == (2, 3, 4 - shift, *positions)
        torch.testing.assert_close(rows.flatten(), expected.flatten())
        mean, lse, accuracy = L.linear_cross_entropy(
            shaped, head, labels, return_lse=True, return_accuracy=True, **options
        )
        torch.testing.assert_close(mean, F.cross_entropy(logits, moved[1]))
        torch.testing.assert_close(lse.flatten(), logits.logsumexp(1).flatten())
        kept = moved[1] != -100
        torch.testing.assert_close(accuracy, ((logits.argmax(1) == moved[1]) & kept).sum() / kept.sum().double())
        soft = soft_target(target, torch.float64).reshape(2, 3, 4, CLASSES, *positions)
        shifted = soft[:, :, shift:].flatten(0, 2)
        got = L.linear_cross_entropy(shaped, head, soft, **options)
        torch.testing.assert_close(got, F.cross_entropy(logits, shifted))


def test_one_row_without_a_dimension_of_rows():
    input, head, bias, target = data(torch.float32)
    got = L.linear_cross_entropy(input[0], head, target[0], linear_bias=bias, chunk_rows=1, reduction="none")
    torch.testing.assert_close(got, F.cross_entropy(F.linear(input[0], head, bias), target[0]))
    assert got.shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_normalizer_divides_the_sum(dtype):
    input, head, bias, target = data(dtype)
    by_number, by_tensor = (
        L.linear_cross_entropy(input, head, target, linear_bias=bias, normalizer=given, chunk_rows=4)
        for given in (40.0, torch.tensor(40, device=input.device))
    )
    assert torch.equal(by_number, by_tensor) and by_number.dtype == dtype
    expected, gradients = exact(input, head, bias, target, reduction="sum")
    got = torch.autograd.grad(by_number, (input, head, bias), upstreams(by_number))
    scale = upstreams(by_number)[0].double() / upstreams(expected[0])[0].double() / 40
    assert_near(list(got), [each * scale for each in gradients], TOLERANCE[dtype])
    assert_near([by_number.detach()], [expected[0].detach() / 40], TOLERANCE[dtype])


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_frozen_costs_no_product(dtype, frozen):
    tensors = data(dtype)
    tensors[frozen].requires_grad_(False)

    def products(leaves: list[Tensor]) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            L.linear_cross_entropy(*leaves[:2], tensors[3], linear_bias=leaves[2], chunk_rows=ROWS).backward()
        return sum(
            event.name() in ("aten::mm", "aten::addmm", "aten::addmm_")
            for event in profiled.profiler.kineto_results.events()
        )

    products_of_all = products([each.detach().requires_grad_() for each in tensors[:3]])
    assert products(tensors[:3]) == products_of_all - 1
    assert [each.grad is None for each in tensors[:3]] == [i == frozen for i in range(3)]


@needs_extension
def test_gradients_of_half_precision_keep_the_target_of_confident_rows():
    """Liger rounded p before it took 1 away: 20 % off at p = .99, all of it at .999."""
    for gap in (4.6, 6.9):
        input = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
        head = torch.tensor([[gap], [0.0]], dtype=torch.bfloat16, requires_grad=True)
        value = L.linear_cross_entropy(input, head, torch.tensor([0]), chunk_rows=1)
        value.backward()
        p_wrong = torch.sigmoid(-head[0, 0].detach().double())
        torch.testing.assert_close(
            head.grad[:, 0].double(), p_wrong * torch.tensor([-1.0, 1.0]).double(), rtol=1e-2, atol=0
        )


def test_an_upstream_gradient_for_each_row_counts_for_its_row():
    """Others multiplied all rows by the first number."""
    input, head, bias, target = data(torch.float64)
    rows = L.linear_cross_entropy(input, head, target, reduction="none", chunk_rows=4)
    upstream = torch.arange(ROWS, dtype=torch.float64, device=input.device)
    got = torch.autograd.grad(rows, (input, head), upstream)
    logits = F.linear(input, head)
    expected = torch.autograd.grad(F.cross_entropy(logits, target, reduction="none"), (input, head), upstream)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_ignored_may_hold_anything(dtype):
    input, head, bias, target = data(dtype)
    with torch.no_grad():
        input[1::4] = torch.nan
    value = L.linear_cross_entropy(input, head, target, linear_bias=bias, chunk_rows=4)
    for each in torch.autograd.grad(value, (input, head, bias)):
        assert each.isfinite().all()
    nothing = torch.full_like(target, -100)
    for all_ignored in ("nan", "zero"):
        value = L.linear_cross_entropy(input, head, nothing, all_ignored=all_ignored, chunk_rows=4)
        assert value.isnan() if all_ignored == "nan" else value == 0
        assert all((each == 0).all() for each in torch.autograd.grad(value, (input, head)))


@on_cpu_alone("autocast of a GPU is another dtype; results against whole logits run there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_products_in_half_precision_and_a_float32_loss(dtype):
    input, head, bias, target = data(torch.float32)
    with torch.autocast("cpu", dtype):
        value = L.linear_cross_entropy(input, head, target, linear_bias=bias, chunk_rows=4)
        expected = F.cross_entropy(F.linear(input, head, bias), target)
    assert value.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)
    got, wanted = (torch.autograd.grad(each, (input, head, bias)) for each in (value, expected))
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-3)


def test_a_scaled_loss_in_float16_keeps_small_gradients():
    """As a GradScaler scales it: the mean of many rows of many classes would underflow."""
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()
    input, head = (torch.randn(n, 4, generator=generator, device="cpu") / 8 for n in (2000, 300))
    target = torch.randint(300, (2000,), generator=generator, device="cpu").to(device)
    leaves = [each.to(device, torch.float16).requires_grad_() for each in (input, head)]
    value = L.linear_cross_entropy(*leaves, target, chunk_rows=300, out_dtype=torch.float32)
    got = torch.autograd.grad(value * 65536.0, leaves)
    precise = [each.detach().double().requires_grad_() for each in leaves]
    expected = torch.autograd.grad(F.cross_entropy(F.linear(*precise), target) * 65536.0, precise)
    assert_near(list(got), list(expected), 2e-3)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"return_lse": True}, {"grad_in_forward": False}], ids=str
)
def test_derivatives_of_first_and_second_order(options):
    input, head, bias, target = data(torch.float64, rows=5)
    call = lambda x, w, b: L.linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=2, **options)  # noqa: E731
    assert gradcheck(call, (input, head, bias), check_batched_grad=not options, check_forward_ad=not options)
    assert gradgradcheck(call, (input, head, bias))


def test_focal_loss_and_log_probs_have_linear_forms():
    input, head, bias, target = data(torch.float64, rows=6)
    alpha = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64, device=input.device)
    logits = F.linear(input, head, bias)
    options = {"linear_bias": bias, "chunk_rows": 2}
    torch.testing.assert_close(
        L.linear_focal_loss(input, head, target, alpha, 1.5, **options), L.focal_loss(logits, target, alpha, 1.5)
    )
    for got, expected in zip(
        L.linear_log_probs(input, head, target, temperature=0.7, return_entropy=True, **options),
        L.log_probs(logits, target, temperature=0.7, return_entropy=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    assert gradcheck(lambda x, w: L.linear_focal_loss(x, w, target, None, 2.0, chunk_rows=2), (input, head))
    assert gradcheck(lambda x, w: L.linear_log_probs(x, w, target, return_entropy=True, chunk_rows=2), (input, head))
    with pytest.raises(ValueError, match="expected class indices"):
        L.linear_focal_loss(input, head, soft_target(target, torch.float64))


def test_a_change_before_backward_is_noticed():
    input, head, bias, target = data(torch.float32)
    value = L.linear_cross_entropy(input, head, target, reduction="none", chunk_rows=4)
    with torch.no_grad():
        head.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@needs_extension
@on_cpu_alone("counts the memory of the CPU; the buffers are the same on a GPU")
def test_memory_beside_the_gradients_is_one_chunk():
    rows, classes = 512, 32_768
    input, head = torch.randn(rows, 64, requires_grad=True), torch.randn(classes, 64, requires_grad=True)
    target = torch.randint(classes, (rows,))
    gradients = 4 * 64 * (rows + classes)
    peak = peak_bytes(lambda: L.linear_cross_entropy(input, head, target, chunk_rows=64).backward())
    assert gradients < peak <= gradients + 4 * 64 * classes + 100 * rows
    half, half_head = (each.detach().bfloat16().requires_grad_() for each in (input, head))
    peak = peak_bytes(lambda: L.linear_cross_entropy(half, half_head, target, chunk_rows=64).backward())
    assert peak <= gradients // 2 + 2 * 64 * classes + 2 * 64 * rows + 2**19  # and what oneDNN packs


@needs_extension
@on_cpu_alone("about threads of the CPU")
def test_the_loss_does_not_depend_on_the_number_of_threads(threads):
    """The gradients do in their last digits: MKL cuts the sums of those products between threads."""
    input, head = torch.randn(1000, 16, requires_grad=True), torch.randn(900, 16, requires_grad=True)
    target = torch.randint(900, (1000,))
    runs = []
    for number in (1, 2):
        threads(number)
        value = L.linear_cross_entropy(input, head, target, chunk_rows=300)
        runs.append([value.detach(), *torch.autograd.grad(value, (input, head))])
    assert torch.equal(runs[0][0], runs[1][0])
    torch.testing.assert_close(runs[0][1:], runs[1][1:])


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"linear_weight": torch.ones(4)}, RuntimeError, "linear_weight with dimensionality at least 2, got 1"),
        ({"linear_weight": torch.ones(4, 3)}, RuntimeError, "expected equal input and linear_weight last dimensions"),
        ({"linear_bias": torch.ones(3)}, RuntimeError, r"expected linear_bias shape \(11,\), got \(3,\)"),
        ({"target": torch.full((ROWS,), CLASSES)}, IndexError, f"Target {CLASSES} is out of bounds"),
        ({"target": torch.tensor([0] * (ROWS - 1) + [-3])}, IndexError, "Target -3 is out of bounds"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ({"chunk_rows": 1.0}, TypeError, "chunk_rows must be an int, not float"),
        ({"shift": -1}, ValueError, "shift must be at least 0, got -1"),
        ({"shift": ROWS}, ValueError, f"shift must be below the length {ROWS} of the sequences, got {ROWS}"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer needs reduction='mean'"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"logit_scale": "2"}, TypeError, "argument 'logit_scale' must be float, not str"),
        ({"out_dtype": torch.int32}, ValueError, "out_dtype must be a floating point type"),
        ({"reduction": "median"}, ValueError, "median is not a valid value for reduction"),
        ({"all_ignored": "one"}, ValueError, 'all_ignored must be "nan" or "zero"'),
    ],
    ids=str,
)  # fmt: skip
@on_cpu_alone("a target out of range is reported later there; see gpu/")
def test_what_does_not_fit_is_named(change, error, words):
    input, head, bias, target = data(torch.float32)
    call = {"input": input, "linear_weight": head, "target": target, "linear_bias": bias, "chunk_rows": 4, **change}
    with pytest.raises(error, match=words):
        L.linear_cross_entropy(**call)


def test_a_sharded_head_is_refused_by_name():
    class DTensor(Tensor):
        placements = "(Shard(dim=0),)"

    input, head, _, target = data(torch.float32)
    with pytest.raises(RuntimeError, match=r"linear_weight to be whole on every rank.*Shard.*full_tensor"):
        L.linear_cross_entropy(input, head.detach().as_subclass(DTensor), target)


# ---- the path, and the module


@needs_extension
@on_cpu_alone("the words name the CPU")
def test_explain_names_the_chunks_and_the_bytes():
    input, head = torch.zeros(1024, 64, requires_grad=True), torch.zeros(32_000, 64, requires_grad=True)
    target = torch.zeros(1024, dtype=torch.int64)
    words = fusedloss.explain(L.linear_cross_entropy, input, head, target)
    assert words.startswith("fused: cpu") and words.endswith("2 chunks of 512 rows, 62.5 MiB beside the gradients")
    small = fusedloss.explain(L.linear_cross_entropy, input[:2], head[:5], target[:2])
    assert small.endswith("rows of 5")
    other = fusedloss.explain(L.linear_cross_entropy, input, head, target, logit_scale=torch.tensor(2.0))
    assert other == "native: a logit_scale that is a tensor"
    mixed = fusedloss.explain(L.linear_cross_entropy, input, head.double(), target)
    assert mixed == "native: an input and a head of different dtypes"


def test_the_module_is_torchs_and_shares_a_head():
    loss = fusedloss.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, chunk_rows=4)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        assert isinstance(loss, nn.LinearCrossEntropyLoss)
        assert list(loss.state_dict()) == list(nn.LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True).state_dict())
    input, _, _, target = data(torch.float32)
    expected = F.cross_entropy(loss.linear(input), target)
    for each in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(each(input, target), expected)
    head = nn.Linear(FEATURES, CLASSES, bias=False)
    shared = fusedloss.LinearCrossEntropyLoss.from_linear(head, chunk_rows=4)
    shared(input, target).backward()
    assert shared.linear is head and head.weight.grad is not None
    assert "chunk_rows=4" in repr(shared)
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunks'"):
        fusedloss.LinearCrossEntropyLoss(FEATURES, CLASSES, chunks=4)
    with pytest.raises(ValueError, match="classes for each of"):
        fusedloss.LinearCrossEntropyLoss.from_linear(head, out_features=(3,))
