"""The calls of the losses of whole rows: their operands, what else they are given, and the functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawn import random
from losses import DTYPES, HALVES
from torch import Tensor

import fusedloss
import fusedloss.functional as L

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("cosine_embedding_loss", {"margin": 0.1}),
    "triplet": ("triplet_margin_loss", {}),
    "triplet, swap": ("triplet_margin_loss", {"swap": True, "margin": 0.5}),
    "triplet, norm 1": ("triplet_margin_loss", {"p": 1, "eps": 1e-3}),
    "triplet, norm 1, swap": ("triplet_margin_loss", {"p": 1.0, "swap": True}),
    "margins": ("multi_margin_loss", {}),
    "margins, squared": ("multi_margin_loss", {"p": 2, "margin": 0.7}),
    "margins, weight": ("multi_margin_loss", {}),
}
MODULES = {
    "cosine_embedding_loss": "CosineEmbeddingLoss",
    "triplet_margin_loss": "TripletMarginLoss",
    "multi_margin_loss": "MultiMarginLoss",
}
OPS = {function: function.removesuffix("_loss") for function in MODULES}
ALL = pytest.mark.parametrize("call", CALLS)
EVERY_FUNCTION = pytest.mark.parametrize("function", MODULES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(call: str, rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The operands that may require a gradient, and what else the function is given."""
    function, options = CALLS[call]
    operands = [random(*rows, columns, seed=seed).to(dtype) for seed in range(3)]
    if function == "triplet_margin_loss":
        return operands, options
    if function == "cosine_embedding_loss":
        labels = random(*rows, seed=5)
        labels = torch.where(labels.abs() < 0.1, 3.0, labels.sign()).to(dtype)
        return operands[:2], {**options, "target": labels}
    target = (random(*rows, seed=6).abs() * 1000).long() % columns
    weight = {"weight": (random(columns, seed=7).abs() + 0.1).to(dtype)} if "weight" in call else {}
    return operands[:1], {**options, **weight, "target": target}


def of(functions: Any, call: str, given: dict[str, Any], **more: Any) -> Callable[..., Tensor]:
    function = getattr(functions, CALLS[call][0])
    return lambda *operands: function(*operands, **given, **more)


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in given.items()
    }


def fused(call: str, operands: list[Tensor], given: dict[str, Any], **more: Any) -> bool:
    return fusedloss.explain(of(L, call, given, **more), *operands).startswith("fused")


def refused(call: str, dtype: torch.dtype) -> bool:
    """What torch's multi_margin_loss does not take on a CPU."""
    return "margins" in call and dtype in HALVES and torch.get_default_device().type == "cpu"
