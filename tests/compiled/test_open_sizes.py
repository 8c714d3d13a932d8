"""Sizes that a compiler keeps open: as many graphs as torch.nn makes, the fused op in each, right results at any size."""

import pytest
import torch
import torch.nn.functional as F
from compare import same
from marks import needs_extension
from observe import compiled_with_ops
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fusedloss
import fusedloss.functional as L

C = 5
CALLS = {
    "cross_entropy": lambda x, y: L.cross_entropy(x, y, torch.linspace(1, 2, C), label_smoothing=0.1),
    "cross_entropy of every row": lambda x, y: L.cross_entropy(x, y, reduction="none"),
    "cross_entropy with lse": lambda x, y: sum(map(torch.sum, L.cross_entropy(x, y, return_lse=True, z_loss=1e-3))),
    "cross_entropy of probabilities": lambda x, y: L.cross_entropy(x, x.detach().softmax(1)),
    "nll": lambda x, y: L.nll_loss(x, y, reduction="sum"),
    "focal": lambda x, y: L.focal_loss(x, y),
    "log_probs": lambda x, y: L.log_probs(x, y),
    "mse": lambda x, y: L.mse_loss(x, x.detach() * 2),
    "mse, broadcast": lambda x, y: L.mse_loss(x, x.detach()[:, :1]),
    "huber, weight": lambda x, y: L.huber_loss(x, x.detach() * 2, weight=x.detach().abs(), reduction="none"),
    "logits": lambda x, y: L.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "logits, class indices": lambda x, y: L.binary_cross_entropy_with_logits(x, y, ignore_index=-100),
    "sigmoid focal, class indices": lambda x, y: L.sigmoid_focal_loss(x, y),
}


def data(rows: int, *inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, C, *inner, requires_grad=True), torch.randint(2, C, (rows, *inner))


@needs_extension
@pytest.mark.thinned(1)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("call", CALLS)
def test_twenty_batch_sizes_make_the_graphs_of_torch(call, dynamic):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[call], backend=backend, dynamic=dynamic)
    for rows in range(21, 1, -1):
        x, y = data(rows)
        value = compiled(x, y)
        torch.testing.assert_close(value, CALLS[call](x, y))
        value.sum().backward()
    assert backend.frame_count <= (1 if dynamic else 2) + ("weight" in call or "entropy" in call) * bool(dynamic)
