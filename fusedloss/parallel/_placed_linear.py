"""A head that is a DTensor, sharded over its classes, in :func:`fusedloss.functional.linear_cross_entropy`."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..losses._dtensors import is_dtensor
from .linear import linear_cross_entropy


def served(operands: dict[str, Any], options: dict[str, Any]) -> Any:
    """``operands``: the head and what goes with it; all are DTensors of the head's mesh, or None."""
    weight = operands["linear_weight"]
    mesh = weight.device_mesh
    cut = [place for place, placement in enumerate(weight.placements) if not placement.is_replicate()]
    of_classes = [Shard(0) if place in cut else Replicate() for place in range(mesh.ndim)]
    if len(cut) != 1 or list(weight.placements) != of_classes:
        raise _refusal("linear_weight", weight, "sharded over its classes, Shard(0), on one dimension of its mesh")
    whole = [Replicate()] * mesh.ndim
    local: dict[str, Any] = {}
    for name, each in operands.items():
        place = of_classes if name in ("linear_weight", "linear_bias") else whole
        if each is None:
            local[name] = None
            continue
        if not is_dtensor(each) or each.device_mesh != mesh or list(each.placements) != place:
            raise _refusal(name, each, f"a DTensor of placements {tuple(place)} on the mesh of linear_weight")
        local[name] = each.to_local(grad_placements=place)
    made = linear_cross_entropy(
        **local, **options, group=mesh.get_group(cut[0]), vocab_size=weight.shape[0]
    )  # fmt: skip
    results = made if isinstance(made, tuple) else (made,)
    placed = tuple(DTensor.from_local(each, mesh, whole, run_check=False) for each in results)
    return placed if isinstance(made, tuple) else placed[0]


def _refusal(name: str, each: Any, expected: str) -> RuntimeError:
    got = f"placements {each.placements}" if is_dtensor(each) else type(each).__name__
    remedy = "redistribute it" if is_dtensor(each) else "pass DTensor.from_local of it"
    if isinstance(each, Tensor) and name == "linear_weight":
        remedy = "pass linear_weight.full_tensor(), or local tensors to fusedloss.parallel.linear_cross_entropy"
    return RuntimeError(f"linear_cross_entropy: expected {name} to be {expected}, got {got}; {remedy}")
