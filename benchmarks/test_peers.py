"""How other packages are called, with functions of torch's in their place."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from . import peers
from .losses import eager_linear


def quack_whole(input: Tensor, head: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    assert bias is None
    return -eager_linear(input, head, target)  # the sign tells it from the chunks


MODULES = {
    "liger_kernel.transformers.functional": SimpleNamespace(liger_fused_linear_cross_entropy=eager_linear),
    "quack.linear_cross_entropy": SimpleNamespace(
        chunked_linear_cross_entropy=eager_linear, linear_cross_entropy_func=quack_whole
    ),
    "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=eager_linear),
}


@pytest.mark.parametrize("name", peers.PEERS["linear"])
def test_linear_peer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "import_module", MODULES.__getitem__)
    loss = peers.PEERS["linear"][name]()
    generator = torch.Generator().manual_seed(0)
    input, target = torch.randn(3, 5, generator=generator), torch.tensor([0, 4, 2])
    for classes in (8, 7):
        head = torch.randn(classes, 5, generator=generator)
        sign = -1 if name == "QuACK" and classes % 8 else 1
        assert torch.equal(loss(input, head, target), sign * eager_linear(input, head, target))


def test_what_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise RuntimeError("no GPU") if name.startswith("quack") else ModuleNotFoundError(name=name.split(".")[0])

    monkeypatch.setattr(peers, "import_module", missing)
    found, why = peers.installed.__wrapped__("linear")
    assert found == {}
    assert why == {
        "Liger": "not installed (liger_kernel)",
        "QuACK": "RuntimeError: no GPU",
        "CCE": "not installed (cut_cross_entropy)",
    }
    assert peers.installed("") == ({}, {})
