"""What torch.compile is handed in PyTorch's own operators on a CPU, and what it keeps an op of: the graph that a
compiler gets, and what `explain` says of the compiled loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import needs_extension, on_cpu_alone
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

import fusedloss
import fusedloss.functional as L
from fusedloss import _captures, explain

pytestmark = [needs_extension, on_cpu_alone("a GPU keeps the ops")]
SIDE = 128
assert SIDE * SIDE == _captures.FEW_ELEMENTS
ARITHMETIC = "native: a formula that torch.compile fuses into its neighbours"
FEW = "native: too few elements for an op to pay under torch.compile"

# A loss, a module or an option, and why few elements of it are left to the compiler, and why many are.
CALLS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "mse": (fusedloss.MSELoss(), ARITHMETIC, ARITHMETIC),
    "mse, weight": (lambda x, t: L.mse_loss(x, t, weight=t), ARITHMETIC, ARITHMETIC),
    "l1": (L.l1_loss, ARITHMETIC, ARITHMETIC),
    "smooth l1": (fusedloss.SmoothL1Loss(reduction="none"), ARITHMETIC, ARITHMETIC),
    "smooth l1, beta 0": (fusedloss.SmoothL1Loss(beta=0.0), ARITHMETIC, ARITHMETIC),
    "huber": (lambda x, t: L.huber_loss(x, t, delta=0.5), ARITHMETIC, ARITHMETIC),
    "logits": (fusedloss.BCEWithLogitsLoss(), FEW, ""),
    "logits, pos_weight": (lambda x, t: L.binary_cross_entropy_with_logits(x, t, pos_weight=t[0]), FEW, ""),
    "logits, class indices": (
        lambda x, t: L.binary_cross_entropy_with_logits(x, indices(t), ignore_index=-100), "", ""
    ),
    "probabilities": (fusedloss.BCELoss(), "", ""),
    "cross-entropy": (lambda x, t: L.cross_entropy(x, indices(t)), FEW, ""),
    "cross-entropy, smoothing": (lambda x, t: L.cross_entropy(x, indices(t), label_smoothing=0.1), FEW, ""),
    "cross-entropy of probabilities": (fusedloss.CrossEntropyLoss(), FEW, ""),
    "cross-entropy, z_loss": (lambda x, t: L.cross_entropy(x, indices(t), z_loss=1e-3), "", ""),
    "cross-entropy, lse": (lambda x, t: L.cross_entropy(x, indices(t), return_lse=True)[0], "", ""),
    "cross-entropy, sample_weight": (lambda x, t: L.cross_entropy(x, indices(t), sample_weight=t[:, 0]), "", ""),
    "nll": (lambda x, t: L.nll_loss(x, indices(t)), FEW, ""),
    "triplets": (lambda x, t: L.triplet_margin_loss(x, t, t.flip(0), swap=True), FEW, ""),
    "cosines": (lambda x, t: L.cosine_embedding_loss(x, t, t[:, 0].round(), margin=0.5), FEW, ""),
    "margins": (lambda x, t: L.multi_margin_loss(x, indices(t), weight=t[0]), FEW, ""),
    "focal": (lambda x, t: L.focal_loss(x, indices(t)), "", ""),
    "sigmoid focal": (L.sigmoid_focal_loss, "", ""),
}  # fmt: skip


def indices(t: torch.Tensor) -> torch.Tensor:
    return (t[:, 0] * t.size(1)).long()


def data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, SIDE), torch.rand(rows, SIDE)


@pytest.mark.parametrize("rows", [SIDE, SIDE + 1])
@pytest.mark.parametrize("call", CALLS)
def test_a_compiled_call_holds_an_op_or_none_and_explain_says_which(call, rows):
    torch._dynamo.reset()
    function, of_few, of_many = CALLS[call]
    x, t = data(rows)
    expected = of_few if rows == SIDE else of_many
    backend = EagerAndRecordGraphs()
    value = torch.compile(function, backend=backend, fullgraph=True)(x, t)
    torch.testing.assert_close(value, function(x, t))
    assert ("fusedloss" in str(backend.graphs[0].graph)) == (not expected)
    told = explain(torch.compile(function), x, t)
    assert told == expected if expected else told.startswith("fused: cpu")
    assert explain(function, x, t).startswith("fused: cpu")  # an eager call


def test_modules_that_are_compiled_in_place_are_told_as_such():
    module = fusedloss.MSELoss()
    assert explain(module, *data(2)).startswith("fused")
    module.compile()
    assert explain(module, *data(2)) == ARITHMETIC


def test_what_the_kernels_do_not_own_keeps_its_reason():
    x, _ = data(4)
    assert explain(torch.compile(L.huber_loss), x, x.to_sparse()) == explain(L.huber_loss, x, x.to_sparse())


def test_an_open_size_adds_no_graph_and_keeps_the_op():
    torch._dynamo.reset()
    recorded = EagerAndRecordGraphs()
    backend = CompileCounterWithBackend("eager")
    function = lambda x, t: L.binary_cross_entropy_with_logits(x, t)  # noqa: E731
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for rows in (2, 4, SIDE + 1, 6, SIDE):
        compiled(*data(rows))
    assert backend.frame_count == 2
    torch._dynamo.reset()
    torch.compile(function, backend=recorded, dynamic=True, fullgraph=True)(*data(4))
    assert "fusedloss" in str(recorded.graphs[0].graph)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_keeps_the_op(strict):
    for module in (fusedloss.MSELoss(), fusedloss.BCEWithLogitsLoss()):
        assert "fusedloss" in str(torch.export.export(module, data(2), strict=strict).graph)


def test_a_captured_op_is_checked_by_few_guards():
    """Each is paid for at every call: what decides about a call is asked once, while it is traced."""
    counts = []
    for function in (fusedloss.BCEWithLogitsLoss(), L.sigmoid_focal_loss, CALLS["focal"][0]):
        torch._dynamo.reset()
        guards: list[Any] = []
        keep = lambda given: guards.extend(given) or [True] * len(given)  # noqa: B023, E731
        torch.compile(function, backend="eager", options={"guard_filter_fn": keep})(*data(SIDE + 1))
        counts.append(len(guards))
    assert max(counts) < 90, counts
