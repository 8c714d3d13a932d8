"""What a linear loss has beside its logits: ignored rows, the shift, the normalizer, dtypes, chunks, accuracy."""

import math

import linear_calls as calls
import pytest
import torch
import torch.nn.functional as F
from compare import same, upstreams
from linear_calls import CLASSES, IGNORED, doubled, indices, norm_error, operands, probabilities
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension
from torch import Tensor

import fusedloss.functional as L
from fusedloss import explain
from fusedloss.linear._chunks import blocks, bounds, buffer_bytes, product_parts, row_length, rule

EACH_CHUNK = pytest.mark.parametrize("chunk_rows", [None, 1, 3, 100])
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
EACH_FUNCTION = pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_focal_loss", "linear_log_probs"])


def with_grads(function: str, leaves: tuple[Tensor, ...], target: Tensor, **options: object) -> list[Tensor]:
    results = getattr(L, function)(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    results = [results] if isinstance(results, Tensor) else list(results)
    differentiable = [each for each in results if each.requires_grad]
    return [*results, *torch.autograd.grad(differentiable, leaves, upstreams(*differentiable))]


# ---- ignored rows


@pytest.mark.thinned
@EACH_CHUNK
@EACH_REDUCTION
@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_focal_loss"])
def test_several_indices_a_mask_and_bytes_are_ignored_as_one_index_is(
    function, weighted, positions, reduction, chunk_rows
):
    leaves, target = operands(positions=positions), indices(positions=positions)
    options = {"reduction": reduction, "chunk_rows": chunk_rows}
    if weighted:
        options["sample_weight"] = (torch.arange(target.numel()) % 3).float().reshape(target.shape)
    expected = with_grads(function, leaves, target, **options)
    mask = target == IGNORED
    byte = torch.where(mask, 200, target).byte()
    some = torch.where(mask, 2, target)
    of_some = torch.where(torch.isin(some, torch.tensor([2, 5])), IGNORED, some)
    for got, as_one in (
        (with_grads(function, leaves, byte, ignore_index=200, **options), expected),
        (with_grads(function, leaves, target.clamp_min(0), ignore_index=mask, **options), expected),
        (
            with_grads(function, leaves, some, ignore_index=[2, 5], **options),
            with_grads(function, leaves, of_some, **options),
        ),
    ):
        for one, other in zip(got, as_one, strict=True):
            assert torch.equal(one, other)


@EACH_CHUNK
@EACH_REDUCTION
def test_a_mask_beside_probabilities(reduction, chunk_rows):
    leaves, target = operands(), probabilities().float()
    mask = indices() == IGNORED
    got = with_grads(
        "linear_cross_entropy", leaves, target, ignore_index=mask, reduction=reduction, chunk_rows=chunk_rows
    )
    weight = torch.where(mask, 0.0, 1.0)
    for one, other in zip(
        got,
        with_grads(
            "linear_cross_entropy", leaves, target, sample_weight=weight, reduction=reduction, chunk_rows=chunk_rows
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


@needs_extension
@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_a_nan_in_an_ignored_row_reaches_nothing(chunk_rows, options, dtype):
    leaves, target = operands(dtype=dtype), indices()
    ignored = target == IGNORED
    zeroed = with_grads("linear_cross_entropy", leaves, target, chunk_rows=chunk_rows, **options)
    for filler in (math.nan, math.inf):
        with torch.no_grad():
            leaves[0][ignored] = filler
        got = with_grads("linear_cross_entropy", leaves, target, chunk_rows=chunk_rows, **options)
        for one, other in zip(got, zeroed, strict=True):
            assert torch.equal(one, other) and one.isfinite().all()
        assert not got[1][ignored].any()


@needs_extension
@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_CHUNK
@pytest.mark.parametrize(
    "options", [{}, {"grad_in_forward": False}, {"return_lse": True}, {"sample_weight": 0.0}], ids=str
)
def test_where_all_rows_are_ignored_a_mean_is_nan_or_zero_and_gradients_are_zero(options, chunk_rows, dtype):
    leaves, target = operands(dtype=dtype), torch.full((23,), IGNORED)
    if "sample_weight" in options:
        target, options = indices(), {"sample_weight": torch.zeros(23, dtype=dtype)}
    for all_ignored, value in (("nan", math.nan), ("zero", 0.0)):
        for reduction in ("mean", "sum"):
            results = L.linear_cross_entropy(
                leaves[0], leaves[1], target, linear_bias=leaves[2], all_ignored=all_ignored, reduction=reduction,
                chunk_rows=chunk_rows, **options,
            )  # fmt: skip
            loss = results[0] if isinstance(results, tuple) else results
            same(loss.item(), value if reduction == "mean" else 0.0)
            for grad in torch.autograd.grad(loss, leaves):
                assert not grad.any(), (all_ignored, reduction)


# ---- shift


@EACH_CHUNK
@EACH_REDUCTION
@EACH_FUNCTION
@pytest.mark.thinned
@pytest.mark.parametrize(("rows", "positions"), [((9,), ()), ((4, 6), ()), ((2, 3, 5), ()), ((4, 6), (3,))], ids=str)
def test_a_shift_gives_a_row_the_target_of_a_later_one(rows, positions, function, reduction, chunk_rows):
    leaves, target = operands(rows, positions=positions), indices(rows, positions)
    dim = len(rows) - 1
    more = {"chunk_rows": chunk_rows}
    if function != "linear_log_probs":
        more["reduction"] = reduction
    mask, weight = (target < 0) | (target % 3 == 0), torch.rand(target.shape)
    for shift in (1, rows[dim] - 1):
        left = rows[dim] - shift
        cut = lambda tensor, start: tensor.narrow(dim, start, left)  # noqa: B023, E731
        for options in ({}, {"ignore_index": mask}, {"sample_weight": weight}, {"ignore_index": [IGNORED, 4]}):
            if options and function == "linear_log_probs":
                continue
            moved = {
                name: cut(each, shift) if isinstance(each, Tensor) else each  # a mask and weights are of the targets
                for name, each in options.items()
            }
            got = with_grads(function, leaves, target, shift=shift, **options, **more)
            inputs = cut(leaves[0], 0).detach().requires_grad_()
            expected = with_grads(function, (inputs, *leaves[1:]), cut(target, shift), **moved, **more)
            assert got[0].shape == expected[0].shape
            assert not got[-3].narrow(dim, left, shift).any()  # the last rows have no target
            got[-3] = cut(got[-3], 0)
            same(got, expected)


@EACH_CHUNK
def test_a_shift_beside_probabilities_lse_and_accuracy(chunk_rows):
    leaves, target = operands((4, 6)), indices((4, 6))
    for each, options in (
        (probabilities((4, 6)).float(), {}),
        (probabilities((4, 6)).float(), {"reduction": "none"}),
        (target, {"return_lse": True, "return_accuracy": True}),
        (target, {"return_lse": True, "return_accuracy": True, "reduction": "none"}),
    ):
        got = with_grads("linear_cross_entropy", leaves, each, shift=1, chunk_rows=chunk_rows, **options)
        inputs = leaves[0][:, :5].detach().requires_grad_()
        expected = with_grads(
            "linear_cross_entropy", (inputs, *leaves[1:]), each[:, 1:], chunk_rows=chunk_rows, **options
        )
        got[-3] = got[-3][:, :5]
        torch.testing.assert_close(got, expected)


def test_a_shift_copies_no_hidden_states():
    from observe import bytes_allocated

    input, weight, _ = operands((4, 256), features=256, classes=64)
    target = indices((4, 256), classes=64)
    with torch.no_grad():
        plain, moved = (
            bytes_allocated(lambda: L.linear_cross_entropy(input, weight, target, shift=shift, chunk_rows=64))  # noqa: B023
            for shift in (0, 1)
        )
    assert moved - plain < input.numel() * 4 / 8


# ---- divisors, dtypes, accuracy


@needs_extension
@pytest.mark.thinned
@EACH_CHUNK
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_focal_loss"])
def test_a_normalizer_divides_the_sum(function, dtype, chunk_rows):
    leaves, target = operands(dtype=dtype), indices()
    total, *grads = with_grads(function, leaves, target, reduction="sum", chunk_rows=chunk_rows)
    for normalizer in (8, 8.0, torch.tensor(8), torch.tensor([8.0]), torch.tensor(8.0, dtype=torch.float64)):
        got, *got_grads = with_grads(function, leaves, target, normalizer=normalizer, chunk_rows=chunk_rows)
        assert got.dtype == dtype
        torch.testing.assert_close(got, total / 8)
        torch.testing.assert_close(got_grads, [grad / 8 for grad in grads])
    learned = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    input, weight = (each.double() for each in leaves[:2])
    assert torch.autograd.gradcheck(
        lambda divisor: getattr(L, function)(input, weight, target, normalizer=divisor, chunk_rows=chunk_rows), learned
    )


@pytest.mark.thinned
@EACH_CHUNK
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_come_in_the_dtype_that_is_asked_for(dtype, out_dtype, chunk_rows):
    leaves, target = operands(dtype=dtype), indices()
    loss, lse, accuracy, *grads = with_grads(
        "linear_cross_entropy", leaves, target, out_dtype=out_dtype, return_lse=True, return_accuracy=True,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    assert loss.dtype == lse.dtype == out_dtype
    assert all(grad.dtype == dtype for grad in grads)
    exact_leaves = doubled(leaves)
    exact = list(calls.cross_entropy(calls.logits(*exact_leaves), target)[:2])
    bound = max(calls.WITHIN[dtype], calls.WITHIN[out_dtype])
    for got, each in zip((loss, lse, *grads), (*exact, *calls.grads(exact, exact_leaves)), strict=True):
        assert norm_error(got.detach(), each.detach()) < bound


@pytest.mark.thinned(1)
@EACH_CHUNK
@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_accuracy_counts_the_rows_that_count(soft, positions, chunk_rows):
    input, weight, bias = operands(positions=positions)
    target = probabilities(positions=positions).float() if soft else indices(positions=positions)
    made = F.linear(input, weight.reshape(-1, 6), bias.reshape(-1)).reshape(23, CLASSES, *positions)
    right = made.argmax(1) == (target.argmax(1) if soft else target)
    counts = torch.ones_like(right) if soft else target != IGNORED
    share = torch.rand(right.shape).round()
    for options, kept in (({}, counts), ({"sample_weight": share}, counts & (share != 0))):
        each, all_of_them = (
            L.linear_cross_entropy(
                input, weight, target, linear_bias=bias, reduction=reduction, return_accuracy=True,
                chunk_rows=chunk_rows, **options,
            )[1]
            for reduction in ("none", "sum")
        )  # fmt: skip
        assert torch.equal(each.bool(), right & kept) and each.shape == right.shape
        torch.testing.assert_close(all_of_them, (right & kept).sum() / kept.sum())


def test_equal_logits_are_right_where_the_target_is_the_first():
    right = L.linear_cross_entropy(
        torch.ones(2, 1), torch.ones(3, 1), torch.tensor([0, 1]), reduction="none", return_accuracy=True, chunk_rows=1
    )[1]
    assert right.tolist() == [1, 0]


# ---- chunks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_follow_from_the_sizes(dtype, device):
    for rows in (1, 2, 511, 512, 513, 4096, 100_000):
        for columns in (1, 1000, 128_256, 10**9):
            chunk_rows = rule(rows, columns, 0, dtype, device)
            made = bounds(rows, chunk_rows)
            assert [start for start, _ in made] == [0, *(end for _, end in made[:-1])]  # each row once
            assert made[-1][1] == rows
            largest, *others = (end - start for start, end in made)
            assert set(others[:-1]) <= {largest} and made[-1][1] - made[-1][0] <= largest <= chunk_rows
            assert largest * columns * dtype.itemsize <= buffer_bytes(dtype, device) or largest == 1
            if device == "cuda":
                assert largest % 128 == 0 or largest < 128 or len(made) == 1
            elif dtype not in HALVES and largest * columns * dtype.itemsize < buffer_bytes(dtype, device) / 2:
                assert len(made) <= 8
    assert bounds(0, 5) == []


def test_products_and_blocks_take_each_column_once():
    for size in (1, 7, 8, 50257, 128_256):
        for dtype in DTYPES:
            for device in ("cpu", "cuda"):
                for parts in (product_parts(size, dtype, device), blocks((size, 300), 2**16)):
                    ends = [0, *(part.stop for part in parts)]
                    assert [part.start for part in parts] == ends[:-1] and ends[-1] == size
            first, *rest = product_parts(size, dtype, "cuda")
            vector = 16 // dtype.itemsize
            assert size < vector or first.stop % vector == 0 and sum(part.stop - part.start for part in rest) < vector
            assert (
                0 <= row_length(size, dtype, "cuda") - size < vector and row_length(size, dtype, "cuda") % vector == 0
            )


def test_all_rows_are_a_chunk_where_their_logits_are_no_more_than_the_float32_sum():
    """2 * N bytes a class beside 4 * D."""
    for dtype in (torch.bfloat16, torch.float16):
        for device in ("cpu", "cuda"):
            assert rule(8192, 128_256, 4096, dtype, device) == 8192
            assert rule(20_000, 128_256, 4096, dtype, device) < 1000
    assert rule(8192, 128_256, 4096, torch.float32, "cuda") < 1000  # it sums into the gradient itself


@needs_extension
@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has it from 2.13 on")
def test_torchs_options_say_how_many_rows_a_chunk_has():
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    (input, weight, _), target = operands((300,), features=400, classes=1000), indices((300,), classes=1000)
    options = LinearCrossEntropyOptions(batch_chunk_size=100)
    assert "3 chunks of 100 rows" in explain(L.linear_cross_entropy, input, weight, target, options=options)
    asked = explain(L.linear_cross_entropy, input, weight, target, options=options, chunk_rows=150)
    assert "2 chunks of 150 rows" in asked
    got = L.linear_cross_entropy(input, weight, target, options=options)
    torch.testing.assert_close(got, F.cross_entropy(input @ weight.T, target))


@pytest.mark.thinned(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(0, 6, 11), (5, 0, 11), (5, 6, 1)], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_without_rows_or_features_and_with_one_class(chunk_rows, sizes, dtype):
    rows, features, classes = sizes
    leaves = operands((rows,), dtype, features=features, classes=classes)
    target = torch.zeros(rows, dtype=torch.long)
    for reduction in REDUCTIONS:
        got = with_grads("linear_cross_entropy", leaves, target, reduction=reduction, chunk_rows=chunk_rows)
        expected = F.cross_entropy(F.linear(*leaves), target, reduction=reduction)
        same(got, [expected, *torch.autograd.grad(expected, leaves, upstreams(expected))], rtol=2e-2, atol=2e-2)
