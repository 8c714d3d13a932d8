"""The calls of the losses of margins and of distributions that the tests of their contract run over."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import DTYPES
from pointwise_calls import random
from torch import Tensor

# A function, and what a call is given beside input and target, from their shape and dtype.
Options = Callable[[tuple[int, ...], torch.dtype], dict[str, Any]]
CALLS: dict[str, tuple[str, Options]] = {
    "hinge": ("hinge_embedding_loss", lambda shape, dtype: {"margin": 0.7}),
    "soft margin": ("soft_margin_loss", lambda shape, dtype: {}),
    "divergence": ("kl_div", lambda shape, dtype: {}),
    "divergence, log target": ("kl_div", lambda shape, dtype: {"log_target": True}),
    "counts": ("poisson_nll_loss", lambda shape, dtype: {}),
    "counts, full": ("poisson_nll_loss", lambda shape, dtype: {"full": True}),
    "rates": ("poisson_nll_loss", lambda shape, dtype: {"log_input": False, "eps": 1e-2}),
    "rates, full": ("poisson_nll_loss", lambda shape, dtype: {"log_input": False, "full": True}),
    "labels": ("multilabel_soft_margin_loss", lambda shape, dtype: {}),
    "labels, weight": (
        "multilabel_soft_margin_loss",
        lambda shape, dtype: {"weight": (random(*shape[-1:], seed=3).abs() + 0.1).to(dtype)},
    ),
}
MODULES = {
    "hinge_embedding_loss": "HingeEmbeddingLoss",
    "soft_margin_loss": "SoftMarginLoss",
    "kl_div": "KLDivLoss",
    "poisson_nll_loss": "PoissonNLLLoss",
    "multilabel_soft_margin_loss": "MultiLabelSoftMarginLoss",
}
BROADCAST = [call for call in CALLS if call != "soft margin" and "labels" not in call]
WITHOUT_TARGET_GRADIENT = ("hinge", "soft margin")
ALL = pytest.mark.parametrize("call", CALLS)
EVERY_FUNCTION = pytest.mark.parametrize("function", MODULES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def reductions(call: str) -> list[str]:
    return ["mean", "sum", "none", *["batchmean"] * ("divergence" in call)]


def numbers(call: str, of_input: tuple[int, ...], of_target: tuple[int, ...]) -> list[Tensor]:
    """An input and a target in float64, for which the loss is defined."""
    x, t = 2 * random(*of_input, seed=1), 3 * random(*of_target, seed=2)
    if "rates" in call:
        x = x.abs() + 0.1
    if call in ("hinge", "soft margin"):
        return [x, 2 * (t > 0).double() - 1]
    if call == "divergence, log target":
        return [x, -t.abs()]
    if "labels" in call:
        return [x, t.sigmoid()]
    return [x, t.abs() + (0.25 if call == "divergence" else 0.5)]


def made(
    call: str, shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype | None = None
) -> tuple[str, list[Tensor], dict[str, Any]]:
    """The function, the tensors, of which the target is of another dtype where one is given, and the options."""
    function, options = CALLS[call]
    x, t = numbers(call, shape, shape)
    return function, [x.to(dtype), t.to(dtype if other is None else other)], options(shape, dtype)


def leaves_of(call: str) -> int:
    """How many of input and target may require a gradient."""
    return 1 if call in WITHOUT_TARGET_GRADIENT else 2
