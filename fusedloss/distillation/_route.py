"""When a divergence takes the op: everything else runs through the native formula."""

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _captures, _route
from .._derivatives import may_keep_gradients, transformed
from .._library import extension, why_native
from .._sizes import exceeds, is_empty
from . import _ops
from ._formula import Call, formula


def divergence(call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The loss, and the student's lse where it is asked for."""
    why = declines(call)
    if why is not None:
        _route.tell_native(why)
        loss, lse = formula(call)
        return loss, lse if return_lse else None
    if not is_compiling():
        _route.tell(_path(call))
    rows = call.student.shape[:-1]
    flat = call._replace(
        student=_rows(call.student),
        teacher=_rows(call.teacher),
        labels=call.labels if call.labels is None else call.labels.long().reshape(-1),
        weight=call.weight if call.weight is None else call.weight.reshape(-1),
    )
    loss, lse = _ops.run(flat, return_lse, not return_lse and _makes_gradient(call))
    if call.reduction == "none" and len(rows) != 1:
        loss = loss.reshape(rows)
    return loss, lse.reshape(rows) if return_lse else None


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def declines(call: Call) -> str | None:
    """Why the op does not own a call, or None where it does."""
    if extension is None:
        return why_native
    tensors = [each for each in call[:4] if isinstance(each, Tensor)]
    for tensor in tensors:
        if why := _captures.unfit(tensor):
            return why
    if why := transformed(tensors):
        return why
    if any(each.device != call.student.device for each in tensors):
        return _captures.DIFFERENT_DEVICES
    device = _captures.DEVICES[call.student.device.type]
    if not all(each.dtype in _captures.DTYPES for each in (call.student, call.teacher)):
        return "the rows are no float64, float32, bfloat16 or float16"
    if call.student.device.type != "cpu" and call.teacher.dtype not in _captures.same_or_wider(call.student):
        return "a teacher of another dtype than the student's"
    if is_empty(call.student):
        return "the rows are empty"
    if exceeds(call.student.shape[-1], device.most_classes):
        return "more classes than a kernel counts"
    if isinstance(call.temperature, Tensor) or isinstance(call.beta, Tensor):
        return "a parameter that is a tensor"
    if call.teacher.requires_grad:
        return "the teacher requires a gradient"
    if call.weight is not None and call.weight.requires_grad:
        return "the weight requires a gradient"
    return None


def _makes_gradient(call: Call) -> bool:
    """Whether forward makes the gradient: where one factor is all that backward has to add.

    Not in float16, whose gradients need the upstream gradient of a GradScaler before they are rounded, and, as for
    cross-entropy, not on a GPU.
    """
    if call.reduction == "none" or call.student.dtype == torch.float16 or call.student.device.type != "cpu":
        return False
    if not (torch.is_grad_enabled() and call.student.requires_grad):
        return False
    return may_keep_gradients()


def _path(call: Call) -> str:
    device = call.student.device.type
    where = f"cpu {extension.cpu_isa()}" if device == "cpu" else device  # type: ignore[union-attr]
    return f"fused: {where}, pairs of rows of {call.student.shape[-1]}"


if extension is not None:
    _ops.register()
