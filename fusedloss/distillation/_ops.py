"""What Python tells of the ops of csrc/torch/distillation.h: their results without data, and their formula."""

from typing import Any

import torch
from torch import Tensor

from .. import _decomposed as _decompositions
from .. import _fake as _fakes
from .._library import extension
from ._formula import Call, formula

_FIELDS = len(Call._fields)
_SAVED = 5  # kSavedOfPair


def captured(call: Call, with_lse: bool) -> tuple[Tensor, Tensor]:
    """The loss and the lse of rows (N, C), by the op, which a graph holds."""
    loss, lse, *_ = torch.ops.fusedloss.kl_divergence(*call, call.wide, with_lse, False)
    return loss, lse


def _fake(*given: Any) -> tuple[Tensor, ...]:
    call, (wide, with_lse, with_grad) = Call(*given[:_FIELDS]), given[_FIELDS:]
    student, rows, arithmetic = call.student, call.student.shape[0], call.computed
    result = arithmetic if wide else student.dtype
    return (
        student.new_empty((rows,) if call.reduction == "none" else (), dtype=result),
        student.new_empty(rows if with_lse else 0, dtype=result),
        student.new_empty(_SAVED * rows, dtype=arithmetic),
        torch.empty_like(student) if with_grad else student.new_empty(0),
    )


def _fake_carrying(*given: Any) -> tuple[Tensor, Tensor]:
    loss, _, statistics, _ = _fake(*given, False, False)
    return loss, statistics


def _fake_backward(upstream: Tensor, upstream_lse: Tensor | None, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student)


def _fake_with_grad_in_place(student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    computed = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.new_empty((), dtype=computed)


def _native(*given: Any) -> tuple[Tensor, Tensor]:
    """What a backward that is itself differentiated differentiates: a call, and whether its results were wide."""
    return formula(Call(*given[:_FIELDS]), given[_FIELDS])


def _decomposed(*given: Any) -> tuple[Tensor, ...]:
    """The op in PyTorch's own operators. What only its own backward reads is zeros."""
    call, (wide, with_lse, _) = Call(*given[:_FIELDS]), given[_FIELDS:]
    loss, lse = formula(call, wide)
    zeros = call.student.new_zeros
    return (
        loss,
        lse if with_lse else zeros(0, dtype=lse.dtype),
        zeros(_SAVED * call.student.shape[0], dtype=call.computed),
        zeros(0),
    )


def register() -> None:
    fakes: _fakes.Fakes = {
        "": _fake, ".carrying": _fake_carrying, "_backward": _fake_backward,
        "_with_grad_": _fake_with_grad_in_place, "_backward_": _fakes.nothing,
    }  # fmt: skip
    for suffix, fake in fakes.items():
        torch.library.register_fake(f"fusedloss::kl_divergence{suffix}", fake)
    _decompositions.register(torch.ops.fusedloss.kl_divergence.default, _decomposed)
    extension.distillation.set_native(_native)  # type: ignore[union-attr]
