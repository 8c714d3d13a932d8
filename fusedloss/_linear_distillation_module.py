"""The loss of a student that learns from a teacher and from labels, from hidden states and a head, as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._distillation_module import DistillationLoss
from .distillation._linear import Hard
from .losses.linear_distillation import distilled


class LinearDistillationLoss(DistillationLoss):
    r""":class:`DistillationLoss` of a linear layer's outputs, without its logits.

    The student's logits are made in chunks of rows, which both parts share: a step of a mean or a sum takes the three
    matrix products of the head, and one for a teacher's head. The module owns the student's head, ``self.linear``;
    :meth:`from_linear` takes one that is there.

    Args:
        in_features, num_classes, bias, device, dtype: of the head.
        chunk_rows: as for :func:`fusedloss.functional.linear_cross_entropy`.
        temperature, alpha, direction, beta, teacher_is, ignore_index, reduction: as for :class:`DistillationLoss`.

    A call takes the student's hidden states (..., D), the teacher's numbers (..., C) or, beside a ``teacher_weight``
    and a ``teacher_bias``, its hidden states, the labels (...), which it may leave out where ``alpha`` is 1, and a
    weight for each row.

    >>> loss = LinearDistillationLoss(8, 4, temperature=2.0)
    >>> hidden, teacher = torch.zeros(2, 8), torch.zeros(2, 6)
    >>> loss(hidden, teacher, torch.tensor([0, 3]), teacher_weight=torch.ones(4, 6))
    tensor(0.6931, grad_fn=<...>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.chunk_rows = chunk_rows

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, chunk_rows: int | None = None, **options: Any
    ) -> "LinearDistillationLoss":  # fmt: skip
        """The loss over a head that is there. Its parameters are shared, not copied.

        >>> head = torch.nn.Linear(8, 4)
        >>> LinearDistillationLoss.from_linear(head).linear.weight is head.weight
        True
        """
        loss = cls.__new__(cls)
        DistillationLoss.__init__(loss, **options)
        loss.linear = linear
        loss.chunk_rows = chunk_rows
        return loss

    def forward(
        self,
        input: Tensor,
        teacher: Any,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        if labels is None and self.alpha != 1:
            raise ValueError(f"labels may be left out only where alpha is 1, got alpha={self.alpha}")
        head, bias = self.linear.weight, self.linear.bias
        if self.alpha == 0:
            loss: Tensor = functional.linear_cross_entropy(
                input, head, labels, linear_bias=bias, ignore_index=self.ignore_index,  # type: ignore[arg-type]
                reduction="mean" if self.reduction == "batchmean" else self.reduction, sample_weight=weight,
                chunk_rows=self.chunk_rows,
            )  # fmt: skip
            return loss
        of_teacher = self.alpha * self.temperature**2
        loss = distilled(
            None if self.alpha == 1 else Hard(of_teacher, 1 - self.alpha), input, head, teacher, bias, teacher_weight,
            teacher_bias, self.temperature, self.direction, self.beta, self.teacher_is, labels, self.ignore_index,
            weight, self.reduction, self.chunk_rows,
        )  # fmt: skip
        return of_teacher * loss if self.alpha == 1 else loss

    def extra_repr(self) -> str:
        rows = "" if self.chunk_rows is None else f", chunk_rows={self.chunk_rows}"
        return super().extra_repr() + rows
