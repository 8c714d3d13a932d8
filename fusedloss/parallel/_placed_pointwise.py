"""DTensors in the pointwise losses: each rank computes its own shard, and a mean divides by the elements of all.

torch's mean of a DTensor of uneven shards is the mean of the ranks' means, and the gradients of its losses' own means
are those of one rank's: torch 2.13 gives each rank's mse_loss the gradient of a mean over its shard.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .._dtypes import HALVES
from ..losses._dtensors import is_dtensor


def served(
    loss: Callable[..., Any], formula: Callable[..., Any], input: Any, target: Any, weight: Any, reduction: str,
    *params: Any, **options: Any,
) -> Any:  # fmt: skip
    """``loss``: by the kernels, of plain tensors. ``formula``: in PyTorch's operators. None: the formula as it is."""
    third = options.get("third")
    if reduction not in ("none", "mean", "sum") or options.get("ignore_index") is not None:
        return None
    if not all(is_dtensor(each) for each in (input, target, weight, third) if each is not None):
        return None
    if not _aligned(input, target, weight, third):
        if reduction == "none":
            return None
        return _reduced(formula(input, target, weight, "none", *params, **options), reduction)
    mesh, places = input.device_mesh, input.placements
    x, t, w, other = (
        each if each is None else each.redistribute(mesh, places).to_local(grad_placements=places)
        for each in (input, target, weight, third)
    )
    assert x is not None
    given = {} if other is None else {"third": other}
    if reduction == "none":
        made = loss(x, t, w, "none", *params, **given)
        stride = tuple(math.prod(input.shape[place + 1 :]) for place in range(input.dim()))
        return DTensor.from_local(made.contiguous(), mesh, places, run_check=False, shape=input.shape, stride=stride)
    if reduction == "mean" and x.numel():
        made = loss(x, t, w, "mean", *params, **given) * (x.numel() / input.numel())
    else:
        made = loss(x, t, w, "sum", *params, **given)
    parts = [Partial() if type(each) is Shard else each for each in places]
    return DTensor.from_local(made, mesh, parts, run_check=False)


def _aligned(input: Any, *others: Any) -> bool:
    """Whether every rank has the elements of its shard of the input of all operands, or can have them."""
    if not input.numel() or not all(type(each) is Shard or type(each) is Replicate for each in input.placements):
        return False
    return all(each is None or (each.shape == input.shape and each.device_mesh == input.device_mesh) for each in others)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    """By a sum, which torch makes of shards of any size."""
    total = losses.sum(dtype=torch.float32 if losses.dtype in HALVES else None)
    return (total if reduction == "sum" else total / losses.numel()).to(losses.dtype)
