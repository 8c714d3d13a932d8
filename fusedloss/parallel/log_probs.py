"""Log-probability of the target and entropy over a sharded vocabulary."""

from typing import Any

import torch
from torch import Tensor

from .._dtypes import HALVES
from ._call import Sharding, rows
from ._numbers import fixed
from ._row import Asked


def log_probs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> Any:
    """:func:`fusedloss.functional.log_probs` of logits whose classes are spread over the ranks of a group.

    Args:
        logits, target, group, vocab_start, vocab_size: as for :func:`fusedloss.parallel.cross_entropy`.
        temperature: a number.

    The other arguments are those of :func:`fusedloss.functional.log_probs`, and the errors those of
    :func:`fusedloss.parallel.cross_entropy`. The entropy adds a fourth number a row to what is sent.
    """
    temperature = fixed("log_probs", "temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    row = rows(
        "log_probs", logits, target, None, ignore_index, None,
        Asked(temperature=temperature, entropy=return_entropy), Sharding(group, vocab_start, vocab_size),
    )  # fmt: skip
    dtype = torch.float32 if logits.dtype in HALVES else logits.dtype
    value = (row.doubt - row.of("ce")).to(dtype)
    if not return_entropy:
        return value
    return value, (row.of("third") + row.doubt).to(dtype)
