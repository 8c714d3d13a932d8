"""The linear losses give the values and gradients of the same losses of the logits, whatever the chunks."""

from typing import Any

import linear_calls as calls
import pytest
import torch
import torch.nn.functional as F
from compare import upstreams
from linear_calls import CLASSES, IGNORED, WITHIN, doubled, indices, norm_error, operands, probabilities
from losses import DTYPES, HALVES, REDUCTIONS
from torch import Tensor

import fusedloss.functional as L

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
CHUNKS = pytest.mark.parametrize("chunk_rows", [None, 3, 100])
# The leading dimensions of the hidden states, and the positions of the head.
SHAPES = pytest.mark.parametrize(
    ("rows", "positions"), [((23,), ()), ((23,), (3,)), ((4, 6), ()), ((2, 3, 2), (2, 2)), ((), ())], ids=str
)
GRID = pytest.mark.thinned(2, deep=3)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.02},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.5},
    "weight": {"weight": True},
    "sample_weight": {"sample_weight": True},
    "normalizer": {"normalizer": 7.5},
    "lse": {"return_lse": True},
    "accuracy": {"return_accuracy": True},
    "backward makes the logits": {"grad_in_forward": False},
    "all": {
        "label_smoothing": 0.1, "z_loss": 0.02, "softcap": 2.0, "logit_scale": 0.5, "weight": True,
        "sample_weight": True, "return_lse": True, "return_accuracy": True,
    },
    "all but lse and smoothing": {
        "z_loss": 0.02, "softcap": 2.0, "logit_scale": 0.5, "weight": True, "sample_weight": True,
    },
}  # fmt: skip
OURS_ALONE = ("return_lse", "return_accuracy", "grad_in_forward", "logit_scale")


def of_rows(rows: tuple[int, ...], positions: tuple[int, ...]) -> Tensor:
    """Factors, some of them zero."""
    made = (calls.drawn(*rows, *positions, seed=5).abs() * 8).round() / 8
    if made.dim():
        made.view(-1)[::6] = 0
    return made


def flat(of_rows: Tensor, positions: tuple[int, ...]) -> Tensor:
    """As linear_calls has its rows: (N) or (N, K)."""
    return of_rows.reshape(-1, *([of_rows.numel() and torch.Size(positions).numel()] if positions else []))


def compare(results: Any, exact: Any, leaves: Any, exact_leaves: Any, dtype: torch.dtype) -> None:
    results, exact = ([each] if isinstance(each, Tensor) else list(each) for each in (results, exact))
    exact = [each.reshape(result.shape) for each, result in zip(exact, results, strict=True)]
    upstream = upstreams(*results)
    grads = torch.autograd.grad(results, leaves, upstream)
    exact_grads = torch.autograd.grad(exact, exact_leaves, [each.double() for each in upstream])
    for got, expected in zip((*results, *grads), (*exact, *exact_grads), strict=True):
        assert norm_error(got.detach(), expected.detach()) < WITHIN[dtype]
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves, strict=True))


@GRID
@CHUNKS
@SHAPES
@pytest.mark.parametrize("soft", [False, True])
@EACH_REDUCTION
@pytest.mark.parametrize("option", OPTIONS)
@EACH_DTYPE
def test_cross_entropy_against_float64(dtype, option, reduction, soft, rows, positions, chunk_rows):
    options = dict(OPTIONS[option])
    bias = option != "plain"
    if reduction != "mean":
        options.pop("normalizer", None)
    leaves = operands(rows, dtype, positions)[: 3 if bias else 2]
    exact_leaves = doubled(leaves)
    target = probabilities(rows, positions).to(dtype) if soft else indices(rows, positions)
    exact_options = {name: value for name, value in options.items() if name not in OURS_ALONE}
    if "weight" in options:
        options["weight"] = (calls.drawn(CLASSES, seed=6).abs() + 0.25).to(dtype)
        exact_options["weight"] = options["weight"].double()
    if "sample_weight" in options:
        options["sample_weight"] = of_rows(rows, positions).to(dtype)
        exact_options["sample_weight"] = flat(options["sample_weight"].double(), positions)
    results = L.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2] if bias else None, reduction=reduction,
        chunk_rows=chunk_rows, **options,
    )  # fmt: skip
    z = calls.logits(*exact_leaves, *([] if bias else [None]), options.get("logit_scale", 1.0))
    of_logits = target.double().reshape(z.shape) if soft else flat(target, positions)
    loss, lse, right = calls.cross_entropy(z, of_logits, reduction=reduction, **exact_options)
    wanted = [loss, *([lse] if "return_lse" in options else [])]
    if "return_accuracy" in options:
        *results, accuracy = results
        assert accuracy.dtype == (torch.float32 if dtype in HALVES else dtype) and not accuracy.requires_grad
        # The logits of half types may change places.
        off = (accuracy.double().flatten() - right.flatten()).abs().mean()
        assert off <= (0.1 if dtype in HALVES else 1e-6) or right.isnan().all()
    first = results if isinstance(results, Tensor) else results[0]
    assert first.dtype == dtype and first.shape == ((*rows, *positions) if reduction == "none" else ())
    compare(results, wanted, leaves, exact_leaves, dtype)


@GRID
@CHUNKS
@SHAPES
@EACH_REDUCTION
@pytest.mark.parametrize("option", ["plain", "factor", "of classes", "sample_weight", "normalizer", "in backward"])
@EACH_DTYPE
def test_focal_loss_against_float64(dtype, option, reduction, rows, positions, chunk_rows):
    leaves, target = operands(rows, dtype, positions), indices(rows, positions)
    alpha = (calls.drawn(CLASSES, seed=6).abs() + 0.25).to(dtype)
    options: dict[str, Any] = {
        "plain": {},
        "factor": {"alpha": 0.25, "gamma": 1.5},
        "of classes": {"alpha": alpha, "gamma": 0.5},
        "sample_weight": {"sample_weight": of_rows(rows, positions).to(dtype)},
        "normalizer": {"normalizer": 7.5} if reduction == "mean" else {},
        "in backward": {"grad_in_forward": False},
    }[option]
    result = L.linear_focal_loss(
        leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction, chunk_rows=chunk_rows, **options
    )
    exact_leaves = doubled(leaves)
    options = {key: each.double() if isinstance(each, Tensor) else each for key, each in options.items()}
    options.pop("grad_in_forward", None)
    if "sample_weight" in options:
        options["sample_weight"] = flat(options["sample_weight"], positions)
    exact = calls.focal_loss(calls.logits(*exact_leaves), flat(target, positions), reduction=reduction, **options)
    compare(result, exact, leaves, exact_leaves, dtype)


@GRID
@CHUNKS
@SHAPES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
@EACH_DTYPE
def test_log_probs_and_entropy_against_float64(dtype, entropy, temperature, rows, positions, chunk_rows):
    leaves, target = operands(rows, dtype, positions), indices(rows, positions)
    results = L.linear_log_probs(
        leaves[0], leaves[1], target, linear_bias=leaves[2], temperature=temperature, return_entropy=entropy,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    exact_leaves = doubled(leaves)
    exact = calls.log_probs(calls.logits(*exact_leaves), flat(target, positions), temperature)
    assert {each.dtype for each in (results if entropy else [results])} == {torch.float32 if dtype in HALVES else dtype}
    compare(results, exact if entropy else exact[:1], leaves, exact_leaves, dtype)
    if entropy:  # each alone has its own gradient
        for which in (0, 1):
            results = L.linear_log_probs(
                leaves[0], leaves[1], target, linear_bias=leaves[2], temperature=temperature, return_entropy=True,
                chunk_rows=chunk_rows,
            )  # fmt: skip
            exact = calls.log_probs(calls.logits(*exact_leaves), flat(target, positions), temperature)
            compare(results[which], exact[which], leaves, exact_leaves, dtype)


@pytest.mark.thinned
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on")
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
@EACH_REDUCTION
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(23,), ()], ids=str)
def test_it_is_torchs(rows, bias, reduction, positions):
    positions = positions if rows else ()
    leaves = operands(rows, torch.float64, positions)[: 3 if bias else 2]
    weight = torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64)
    for target, more in (
        (indices(rows, positions), {}),
        (indices(rows, positions), {"weight": weight, "label_smoothing": 0.1}),
        (indices(rows, positions), {"ignore_index": 3}),
        (probabilities(rows, positions), {"weight": weight}),
    ):
        target = torch.where(target == IGNORED, 3, target) if "ignore_index" in more else target
        for chunk_rows in (None, 5):
            ours = {} if chunk_rows is None else {"chunk_rows": chunk_rows}
            got, expected = (
                function(
                    leaves[0], leaves[1], target, linear_bias=leaves[2] if bias else None, reduction=reduction,
                    **more, **given,
                )
                for function, given in ((L.linear_cross_entropy, ours), (F.linear_cross_entropy, {}))
            )  # fmt: skip
            torch.testing.assert_close(got, expected)
            grads = (torch.autograd.grad(each, leaves, upstreams(each)) for each in (got, expected))
            torch.testing.assert_close(*grads)
