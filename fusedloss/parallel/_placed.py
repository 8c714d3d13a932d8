"""DTensor logits: the losses of their shards, of classes, rows or both, without gathering them.

Where one dimension of the mesh cuts the classes, its ranks make the losses of their rows together. Where others cut the
rows, each has its own; a sum over rows is then partial, and a mean is divided by what all rows count.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import functional
from .._dtypes import HALVES
from .._sizes import rows_of
from ..losses._dtensors import is_dtensor
from ..losses._rows import class_dim
from ._call import result_dtype


class Layout(NamedTuple):
    mesh: Any
    classes: int | None  # the dimension of the mesh that cuts them
    rows: list[Any]  # the placements of what each row has one of

    @property
    def over_rows(self) -> list[int]:
        return [place for place, placement in enumerate(self.rows) if type(placement) is Shard]

    @property
    def partial(self) -> list[Any]:
        return [Partial() if type(placement) is Shard else placement for placement in self.rows]


def served(name: str, logits: Any, tensors: dict[str, Any], options: dict[str, Any]) -> Any:
    """The loss of that name as DTensors; None where PyTorch's operators are to make it.

    ``tensors``: the target, and what else is a DTensor or None. A mean of rows that the mesh cuts is the sum, divided.
    """
    layout = layout_of(logits, class_dim(logits))
    given = [each for each in tensors.values() if each is not None]
    if layout is None or not all(is_dtensor(each) for each in given):
        return None
    if layout.over_rows and any(each.requires_grad for each in given):
        return None  # not every torch has the derivative of the sum over ranks that a mean divides by
    whole = [Replicate()] * layout.mesh.ndim
    local = {}
    for key, each in tensors.items():
        place = whole if key in _OF_CLASSES else layout.rows
        local[key] = each if each is None else each.redistribute(layout.mesh, place).to_local(grad_placements=place)
    if layout.classes is None:
        loss, sharding = getattr(functional, name), {}
    else:
        from . import cross_entropy, focal_loss, log_probs

        loss = {"cross_entropy": cross_entropy, "focal_loss": focal_loss, "log_probs": log_probs}[name]
        classes = logits.shape[class_dim(logits)]
        sharding = {"group": layout.mesh.get_group(layout.classes), "vocab_size": classes}
    divides = bool(layout.over_rows) and options.get("reduction") == "mean"
    asked = dict(options)
    # A gradient of the shard is placed as the shard is.
    shard = logits.to_local(grad_placements=logits.placements)
    if divides:
        asked["reduction"] = "sum"
        if logits.dtype in HALVES:  # whose sum may be beyond float16
            if "out_dtype" in asked:
                asked["out_dtype"] = torch.promote_types(asked["out_dtype"] or logits.dtype, torch.float32)
            else:
                shard = shard.float()
    results = loss(shard, **local, **asked, **sharding)
    first, *others = results if isinstance(results, tuple) else (results,)
    if divides:
        mean = first.double() / _divisor(layout, logits, local, options)
        first = mean.to(result_dtype(logits.to_local(), options.get("out_dtype")))
    made = [placed(layout, rows_of(logits), each) for each in (first, *others)]
    return tuple(made) if others else made[0]


_OF_CLASSES = ("weight", "alpha")


def layout_of(logits: Any, dim: int) -> Layout | None:
    """``dim``: that of the classes. None where no rank has whole rows or parts of them."""
    classes = None
    rows: list[Any] = []
    for place, placement in enumerate(logits.placements):
        if type(placement) is Shard:
            cut = placement.dim % logits.dim()
            if cut == dim:
                if classes is not None:
                    return None
                classes = place
                rows.append(Replicate())
            else:
                rows.append(placement if cut < dim else Shard(cut - 1))
        elif type(placement) is Replicate:
            rows.append(placement)
        else:
            return None
    return Layout(logits.device_mesh, classes, rows)


def _divisor(layout: Layout, logits: Any, local: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """What the mean over the rows of all ranks divides by: a loss of 1 for each row, summed as that of the rows is."""
    target, weight = local["target"], local.get("weight")
    classes = logits.shape[class_dim(logits)]
    ones = target.new_full((1, 1), -1, dtype=torch.float64).expand(target.numel(), classes)
    sample_weight = local.get("sample_weight")
    counted = functional.nll_loss(
        ones, target.flatten(), weight if weight is None else weight.double(), reduction="sum",
        ignore_index=options["ignore_index"], sample_weight=None if sample_weight is None else sample_weight.flatten(),
    )  # fmt: skip
    counted = over_all_rows(layout, counted)
    return torch.where(counted == 0, torch.inf, counted) if options.get("all_ignored") == "zero" else counted


def over_all_rows(layout: Layout, counted: Tensor) -> Tensor:
    """The sum over the ranks that hold other rows."""
    for place in layout.over_rows:
        name = layout.mesh.get_group(place).group_name
        counted = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(counted, "sum", name))
    return counted


def placed(layout: Layout, shape: torch.Size, result: Tensor) -> Any:
    """A result as a DTensor; ``shape``: that of all rows."""
    if result.dim() == 0 and len(shape):
        return DTensor.from_local(result, layout.mesh, layout.partial, run_check=False)
    stride = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return DTensor.from_local(
        result.contiguous(), layout.mesh, layout.rows, run_check=False, shape=shape, stride=stride
    )
