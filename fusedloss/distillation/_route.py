"""When a divergence takes the op: everything else runs through the native formula."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _captures, _route
from .._derivatives import transformed
from .._library import extension, why_native
from .._sizes import exceeds, is_empty
from . import _ops
from ._formula import Call, formula


def _no_kernels(*given: Any) -> None:
    return None


# run(*call, return_lse): the results of an eager call, or None where the kernels do not own it. It reads the arguments
# itself, and leaves to the caller what is wrong with them.
run = _no_kernels if extension is None else extension.distillation.run


def divergence(call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The loss, and the student's lse where it is asked for: captured by a compiler, or natively."""
    if is_compiling():
        if declines(call) is None:
            return _captured(call, return_lse)
    elif _route.asked() or _route.heard_native:
        path = f"native: {why_native}" if extension is None else extension.distillation.explain(*call, return_lse)
        if not path.startswith("native: "):
            _route.tell(path)
        _route.tell_native(path.removeprefix("native: "))
    loss, lse = formula(call)
    return loss, lse if return_lse else None


def _captured(call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    rows = call.student.shape[:-1]
    flat = call._replace(
        student=_rows(call.student),
        teacher=_rows(call.teacher),
        labels=call.labels if call.labels is None else call.labels.long().reshape(-1),
        weight=call.weight if call.weight is None else call.weight.reshape(-1),
    )
    loss, lse = _ops.captured(flat, return_lse)
    if call.reduction == "none" and len(rows) != 1:
        loss = loss.reshape(rows)
    return loss, lse.reshape(rows) if return_lse else None


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def declines(call: Call) -> str | None:
    """Why the op does not own a call, as csrc/torch/distillation.cpp states it of eager ones; None where it does."""
    if extension is None:
        return why_native
    tensors = [each for each in call[:4] if isinstance(each, Tensor)]
    for tensor in tensors:
        if why := _captures.unfit(tensor):
            return why
    if is_compiling():
        if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
            return "a transform of torch.func, or tracing"
    elif why := transformed(tensors):
        return why
    if any(each.device != call.student.device for each in tensors):
        return _captures.DIFFERENT_DEVICES
    device = _captures.DEVICES[call.student.device.type]
    if not all(each.dtype in _captures.DTYPES for each in (call.student, call.teacher)):
        return "the rows are no float64, float32, bfloat16 or float16"
    if not device.rows_of_any_two_dtypes and call.teacher.dtype not in _captures.same_or_wider(call.student):
        return "a teacher of another dtype than the student's"
    if is_empty(call.student):
        return "the rows are empty"
    if exceeds(call.student.shape[-1], device.most_classes):
        return "more classes than a kernel counts"
    if isinstance(call.temperature, Tensor) or isinstance(call.beta, Tensor):
        return "a parameter that is no number"
    if call.teacher.requires_grad:
        return "the teacher requires a gradient"
    if call.weight is not None and call.weight.requires_grad:
        return "the weight requires a gradient"
    return None


if extension is not None:
    _ops.register()
