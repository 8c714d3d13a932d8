"""The loss of a student that learns from a teacher and from labels, as a module."""

from typing import Any

from torch import Tensor, nn

from . import functional
from .losses._numbers import NUMBERS, checked

_REDUCTIONS = ("none", "sum", "batchmean")


class DistillationLoss(nn.Module):
    r"""Knowledge distillation (Hinton et al. 2015): soft targets of a teacher, and the labels.

    .. math:: \alpha \, \tau^2 \, D(p, x) + (1 - \alpha) \, \mathrm{CE}(x, y)

    D is :func:`fusedloss.functional.kl_divergence` of the student's logits x from the teacher p at the temperature
    :math:`\tau`, whose square keeps the sizes of both gradients alike; CE is
    :func:`fusedloss.functional.cross_entropy` at temperature 1.

    Args:
        temperature: :math:`\tau`, positive.
        alpha: the share of the teacher, in [0, 1]. A part of share 0 is not computed.
        direction, beta, teacher_is, rest: as for the function.
        ignore_index: rows of this label count in neither part.
        reduction: ``"batchmean"``, over the rows that count, ``"sum"`` or ``"none"``.

    A call takes the logits (..., C), the teacher, the labels (...), which it may leave out where ``alpha`` is 1, and a
    weight for each row.

    >>> loss = DistillationLoss(temperature=2.0, alpha=0.5)
    >>> loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor(0.3037)
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 0.5,
        direction: str = "forward",
        beta: float = 0.5,
        teacher_is: str = "logits",
        ignore_index: int = -100,
        reduction: str = "batchmean",
        rest: str = "bucket",
    ) -> None:
        super().__init__()
        self.temperature = _number("temperature", temperature)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.alpha = _number("alpha", alpha)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
        self.direction = direction
        self.beta = beta
        self.teacher_is = teacher_is
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.rest = rest

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor | tuple[Tensor, Tensor],
        labels: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        soft = hard = None
        if self.alpha != 0:
            divergence = functional.kl_divergence(
                student_logits, teacher, temperature=self.temperature, direction=self.direction, beta=self.beta,
                teacher_is=self.teacher_is, labels=labels, ignore_index=self.ignore_index, weight=weight,
                reduction=self.reduction, rest=self.rest,
            )  # fmt: skip
            soft = self.alpha * self.temperature**2 * divergence
        if self.alpha != 1:
            hard = (1 - self.alpha) * self._of_labels(student_logits, labels, weight)
        if soft is None or hard is None:
            return hard if soft is None else soft  # type: ignore[return-value]
        return soft + hard

    def _of_labels(self, student_logits: Tensor, labels: Tensor | None, weight: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError(f"labels may be left out only where alpha is 1, got alpha={self.alpha}")
        rows = student_logits.shape[:-1]
        if labels.shape != rows:
            raise ValueError(f"labels must be of the rows' shape {tuple(rows)}, got shape {tuple(labels.shape)}")
        loss: Tensor = functional.cross_entropy(
            student_logits.reshape(-1, student_logits.shape[-1]), labels.reshape(-1), ignore_index=self.ignore_index,
            reduction="mean" if self.reduction == "batchmean" else self.reduction,
            sample_weight=weight if weight is None else weight.reshape(-1),
        )  # fmt: skip
        return loss.reshape(rows) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        beta = f", beta={self.beta}" if self.direction == "jsd" else ""
        ignored = "" if self.ignore_index == -100 else f", ignore_index={self.ignore_index}"
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, direction={self.direction!r}{beta}, "
            f"teacher_is={self.teacher_is!r}{ignored}, reduction={self.reduction!r}"
        )


def _number(name: str, value: Any) -> Any:
    return value if isinstance(value, NUMBERS) else checked("DistillationLoss", name, value)
