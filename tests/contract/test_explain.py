"""`fusedloss.explain`: the path a call takes, told without taking it."""

import pytest
import torch
from marks import needs_extension, on_cpu_alone

import fusedloss
import fusedloss.functional as L
from fusedloss import explain

X, Y = torch.randn(4, 300, device="cpu"), torch.randint(300, (4,), device="cpu")
MAP = torch.zeros(2, 8, 8, dtype=torch.uint8, device="cpu")

FUSED = {
    "rows of 300": lambda: explain(fusedloss.CrossEntropyLoss(label_smoothing=0.1), X, Y),
    "rows of 300 ": lambda: explain(L.cross_entropy, X, X.softmax(1), return_lse=True),
    "columns of 21": lambda: explain(fusedloss.CrossEntropyLoss(ignore_index=255), torch.randn(2, 21, 8, 8), MAP),
    "rows of 300  ": lambda: explain(L.log_probs, X.bfloat16(), Y, return_entropy=True),
    "rows of 300   ": lambda: explain(L.sigmoid_focal_loss, X, Y),
    "1200 elements": lambda: explain(L.huber_loss, X, X),
}
NATIVE = {
    "the probabilities require a gradient": lambda: explain(L.cross_entropy, X, X.softmax(1).requires_grad_()),
    "the weight requires a gradient": lambda: explain(
        L.nll_loss, X, Y, torch.ones(300, device="cpu", requires_grad=True)
    ),
    "class probabilities in a focal loss": lambda: explain(fusedloss.FocalLoss(), X, X.softmax(1)),
    "the target holds no class indices in int64 or uint8": lambda: explain(L.cross_entropy, X, Y.int()),
    "a device, layout or view without kernels": lambda: explain(L.huber_loss, X.to("meta"), X.to("meta")),
    "an input and a target whose shapes do not fit": lambda: explain(L.sigmoid_focal_loss, X, X[:1]),
    "inputs of different dtypes": lambda: explain(L.mse_loss, X, X.double()),
    "a parameter that is out of range": lambda: explain(L.huber_loss, X, X, delta=0.0),
    "a weight that requires a gradient": lambda: explain(L.mse_loss, X, X, weight=X.clone().requires_grad_()),
    "a target that requires a gradient": lambda: explain(L.sigmoid_focal_loss, X, X.clone().requires_grad_()),
    "an input or target that is no float64, float32, bfloat16 or float16": lambda: explain(L.huber_loss, X, X.long()),
    "an empty input": lambda: explain(L.mse_loss, X[:0], X[:0]),
}


@needs_extension
@on_cpu_alone("names the CPU; test_gpu.py counts launches")
@pytest.mark.parametrize("work", FUSED)
def test_a_fused_call_is_told_with_its_device_and_work(work):
    isa = fusedloss._route.extension.cpu_isa()
    assert FUSED[work]() == f"fused: cpu {isa}, {work.strip()}"


@needs_extension
@pytest.mark.parametrize("reason", NATIVE)
def test_a_native_call_is_told_with_its_reason(reason):
    assert NATIVE[reason]() == f"native: {reason}"


@needs_extension
def test_modes_are_told():
    with torch.autocast("cpu", torch.bfloat16):
        assert explain(L.cross_entropy, X.bfloat16(), Y).startswith("fused")
        assert explain(L.huber_loss, X.bfloat16(), X).startswith("fused")
        assert explain(L.sigmoid_focal_loss, X, Y) == "native: autocast"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert explain(L.cross_entropy, dual, Y) == "native: forward-mode AD"


def test_nothing_is_computed_and_later_calls_are():
    target = torch.tensor([0, 1, 2, 300], device="cpu")  # out of range, which a call would raise
    assert explain(L.cross_entropy, X, target)
    assert L.cross_entropy(X, Y).isfinite()
    with pytest.raises(IndexError):
        L.cross_entropy(X, target)


def test_what_is_no_loss_of_this_package_is_refused():
    with pytest.raises(ValueError, match="expected a loss of fusedloss"):
        explain(torch.nn.functional.cross_entropy, X, Y)
    for other in (fusedloss.CrossEntropyLoss, None):
        with pytest.raises(ValueError, match="expected a loss of fusedloss, a module or a function, got"):
            explain(other, X, Y)
    with pytest.raises(ValueError, match="softcap must be positive, got -1"):
        explain(L.cross_entropy, X, Y, softcap=-1.0)
