"""A student's divergence from a teacher, from hidden states and a head, without ever holding the logits."""

from typing import Any

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route
from ..distillation._linear import Given, Hard, linear_divergence
from ..linear import Head
from ._dtensors import refuse_dtensor
from ._linear import Given as GivenHead
from ._linear import check_head, checked_rows, flat_head
from .distillation import check_names, check_of_rows, checked_numbers

__all__ = ["linear_kl_divergence"]

_FUNCTION = "linear_kl_divergence"


def linear_kl_divergence(
    input: Tensor,
    linear_weight: Tensor,
    teacher: Tensor,
    *,
    linear_bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    teacher_is: str = "logits",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    chunk_rows: int | None = None,
    grad_in_forward: bool | None = None,
) -> Tensor:
    r"""Divergence of a linear layer's outputs from a teacher: :func:`kl_divergence` in the form of
    :func:`linear_cross_entropy`.

    The student's logits :math:`h W^\top + b` are made in chunks of rows, and so is their gradient, in the same memory.
    With a ``teacher_weight`` the teacher's are made beside them, a chunk at a time.

    Args:
        input: the student's hidden states h, (D) or (..., D).
        linear_weight: the student's head W, (C, D).
        teacher: without a ``teacher_weight`` the teacher's numbers (..., C), and otherwise its hidden states, (..., E),
            of any width.
        linear_bias: b, (C).
        teacher_weight, teacher_bias: the teacher's head, (C, E) and (C). Pass them detached: a teacher's side that
            requires a gradient gets it natively, through whole logits.
        temperature, direction, beta, teacher_is, labels, ignore_index, weight, reduction: as for :func:`kl_divergence`.
            A teacher's head makes logits.
        chunk_rows, grad_in_forward: as for :func:`linear_cross_entropy`.

    Returns:
        In the dtype of the hidden states; beside a wider teacher, and under autocast, in float32 of bfloat16 and
        float16.

    Raises:
        RuntimeError: as :func:`linear_cross_entropy`, for a head that does not fit.
        ValueError: the shapes of a teacher, of labels or of weights do not fit; ``teacher_is`` is not ``"logits"``
            beside a ``teacher_weight``; ``chunk_rows`` is below 1.
        ValueError, TypeError: as :func:`kl_divergence`. Its teachers of k classes are not taken.

    >>> hidden, head = torch.tensor([[1.0]]), torch.tensor([[2.0], [0.0]])
    >>> linear_kl_divergence(hidden, head, torch.tensor([[0.0, 0.0]]))
    tensor(0.4338)
    >>> linear_kl_divergence(hidden, head, torch.tensor([[1.0, 1.0]]), teacher_weight=torch.zeros(2, 2))
    tensor(0.4338)
    """
    tensors = (input, linear_weight, teacher, linear_bias, teacher_weight, teacher_bias, labels, weight)
    if has_torch_function_variadic(*tensors) and _route.overrides_apply():
        return _route.overridden(  # type: ignore[no-any-return]
            linear_kl_divergence, tensors, input, linear_weight, teacher, linear_bias=linear_bias,
            teacher_weight=teacher_weight, teacher_bias=teacher_bias, temperature=temperature, direction=direction,
            beta=beta, teacher_is=teacher_is, labels=labels, ignore_index=ignore_index, weight=weight,
            reduction=reduction, chunk_rows=chunk_rows, grad_in_forward=grad_in_forward,
        )  # fmt: skip
    return distilled(
        None, input, linear_weight, teacher, linear_bias, teacher_weight, teacher_bias, temperature, direction, beta,
        teacher_is, labels, ignore_index, weight, reduction, chunk_rows, grad_in_forward,
    )  # fmt: skip


def distilled(
    hard: Hard | None, input: Tensor, linear_weight: Tensor, teacher: Tensor, linear_bias: Tensor | None,
    teacher_weight: Tensor | None, teacher_bias: Tensor | None, temperature: Any, direction: str, beta: Any,
    teacher_is: str, labels: Tensor | None, ignore_index: int, weight: Tensor | None, reduction: str,
    chunk_rows: int | None, grad_in_forward: bool | None = None,
) -> Tensor:  # fmt: skip
    """The divergence; with ``hard`` its sum with the cross-entropy of the labels."""
    tensors = (input, linear_weight, teacher, linear_bias, teacher_weight, teacher_bias, labels, weight)
    if has_torch_function_variadic(*tensors) and _route.overrides_apply():
        return _route.overridden(  # type: ignore[no-any-return]
            distilled, tensors, hard, input, linear_weight, teacher, linear_bias, teacher_weight, teacher_bias,
            temperature, direction, beta, teacher_is, labels, ignore_index, weight, reduction, chunk_rows,
            grad_in_forward,
        )  # fmt: skip
    check_names(direction=direction, teacher_is=teacher_is, reduction=reduction)
    temperature, beta = checked_numbers(_FUNCTION, temperature, beta)
    student = GivenHead(input, linear_weight, linear_bias, None)
    check_head(_FUNCTION, student)
    if linear_weight.dim() != 2:
        raise RuntimeError(f"expected linear_weight with dimensionality 2, got {linear_weight.dim()}")
    for name, tensor in (("input", input), ("linear_weight", linear_weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating point dtype, got {tensor.dtype}")
    _check_teacher(student, teacher, teacher_weight, teacher_bias, teacher_is)
    for name, of_rows in (("labels", labels), ("weight", weight)):
        refuse_dtensor(_FUNCTION, name, of_rows, "whole", "full_tensor")
    rows = input.shape[:-1]
    check_of_rows(tuple(rows), labels, weight)
    of_teacher: Head | Tensor = teacher.reshape(-1, teacher.shape[-1]) if teacher.dim() != 2 else teacher
    if teacher_weight is not None:
        of_teacher = flat_head(GivenHead(teacher, teacher_weight, teacher_bias, None), 1.0)
    given = Given(
        flat_head(student, 1.0), of_teacher, labels if labels is None else labels.long().reshape(-1),
        weight if weight is None else weight.reshape(-1), direction, teacher_is, reduction, ignore_index, temperature,
        beta,
    )  # fmt: skip
    loss = linear_divergence(given, checked_rows(chunk_rows), grad_in_forward, hard)
    return loss.reshape(rows) if reduction == "none" and len(rows) != 1 else loss


def _check_teacher(student: GivenHead, teacher: Any, head: Tensor | None, bias: Tensor | None, teacher_is: str) -> None:
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"{_FUNCTION}(): argument 'teacher' must be Tensor, not {type(teacher).__name__}; a teacher of k classes "
            "is taken by kl_divergence"
        )
    for name, tensor in (("teacher", teacher), ("teacher_weight", head), ("teacher_bias", bias)):
        refuse_dtensor(_FUNCTION, name, tensor, "whole", "full_tensor")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating point dtype, got {tensor.dtype}")
    rows, classes = tuple(student.leading), student.linear_weight.shape[0]
    if head is None:
        if bias is not None:
            raise ValueError("teacher_bias needs teacher_weight, the head that it belongs to")
        if tuple(teacher.shape) != (*rows, classes):
            raise ValueError(
                f"teacher must be of the student's logits' shape {(*rows, classes)}, got shape {tuple(teacher.shape)}; "
                "hidden states need a teacher_weight"
            )
        return
    if teacher_is != "logits":
        raise ValueError(f"teacher_is must be 'logits' beside a teacher_weight, which makes them, got {teacher_is!r}")
    if head.dim() != 2 or head.shape[0] != classes:
        raise ValueError(f"teacher_weight must be of the student's {classes} classes, got shape {tuple(head.shape)}")
    if tuple(teacher.shape) != (*rows, head.shape[1]):
        raise ValueError(
            f"teacher must be hidden states of shape {(*rows, head.shape[1])} for a teacher_weight of shape "
            f"{tuple(head.shape)}, got shape {tuple(teacher.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"teacher_bias must be of shape {(classes,)}, got {tuple(bias.shape)}")
