"""DTensors of :func:`fusedloss.functional.kl_divergence`: shards of classes, rows or both, without gathering them."""

from typing import Any

import torch

from .. import functional
from .._dtypes import HALVES
from ..distillation._formula import Call, rows_kept
from ..losses._dtensors import is_dtensor
from ._placed import layout_of, over_all_rows, placed
from .divergence import kl_divergence


def served(call: Call, return_lse: bool) -> Any:
    """The divergence, or the pair with the lse, as DTensors; None where PyTorch's operators are to make it.

    A mean of rows that the mesh cuts is the sum, divided by what the rows of all ranks count.
    """
    student: Any = call.student
    given: list[Any] = [each for each in call[1:4] if each is not None]
    layout = layout_of(student, student.dim() - 1)
    if layout is None or not all(is_dtensor(each) for each in given) or any(each.requires_grad for each in given):
        return None
    numbers = (call.temperature, call.beta)
    if any(isinstance(each, torch.Tensor) for each in numbers) or (return_lse and layout.classes is not None):
        return None
    mesh, places = layout.mesh, [student.placements, layout.rows, layout.rows]
    tensors: tuple[Any, ...] = call[1:4]
    local_tensors: list[Any] = [
        each if each is None else each.redistribute(mesh, place).to_local()
        for each, place in zip(tensors, places, strict=True)
    ]
    teacher, labels, weight = local_tensors
    shard = student.to_local(grad_placements=student.placements)  # a gradient of the shard is placed as the shard is
    local = call._replace(student=shard, teacher=teacher, labels=labels, weight=weight)
    divides = bool(layout.over_rows) and call.reduction in ("batchmean", "mean")
    options: dict[str, Any] = {
        "labels": labels, "weight": weight, "direction": call.direction, "teacher_is": call.teacher_is,
        "ignore_index": call.ignore_index, "temperature": call.temperature, "beta": call.beta,
        "reduction": "sum" if divides else call.reduction,
    }  # fmt: skip
    if divides and shard.dtype in HALVES:  # whose sum may be beyond float16
        shard = shard.float()
    if layout.classes is None:
        made = functional.kl_divergence(shard, teacher, return_lse=return_lse, **options)
    else:
        sharding = {"group": mesh.get_group(layout.classes), "vocab_size": student.shape[-1]}
        made = kl_divergence(shard, teacher, **options, **sharding)
    loss, *lse = made if isinstance(made, tuple) else (made,)
    if divides:
        kept = rows_kept(local)
        rows = torch.ones(local.student.shape[:-1], dtype=torch.float64, device=shard.device)
        rows = rows if weight is None else rows * weight.double()
        counted = over_all_rows(layout, (rows if kept is None else torch.where(kept, rows, 0.0)).sum())
        loss = (loss.double() / (counted if call.reduction == "batchmean" else counted * student.shape[-1])).to(
            local.result
        )
    results = [placed(layout, student.shape[:-1], each) for each in (loss, *lse)]
    return tuple(results) if return_lse else results[0]
