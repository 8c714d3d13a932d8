"""The asymmetric loss as a module."""

import torch
from torch import Tensor, nn

from . import functional
from .losses.asymmetric import exponents_and_margin


class AsymmetricLoss(nn.Module):
    """Asymmetric loss of multi-label classification; see :func:`fusedloss.functional.asymmetric_loss`.

    Args:
        gamma_neg: exponent of negatives, at least 0.
        gamma_pos: exponent of positives, at least 0.
        clip: what is taken off the probability of a negative, from 0 to 1.
        reduction: ``"sum"``, ``"mean"`` or ``"none"``.
        weight: a factor that broadcasts to the input, such as one for each class; it becomes the buffer ``weight``.
        ignore_index: class indices of this value count nowhere and get no gradient.

    >>> AsymmetricLoss(reduction="mean")(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    tensor(0.1319)
    >>> AsymmetricLoss(reduction="mean")(torch.zeros(3, 3), torch.tensor([0, 2, -100]))
    tensor(0.1319)
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "sum",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.clip = exponents_and_margin("AsymmetricLoss", gamma_neg, gamma_pos, clip)
        self.reduction = reduction
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.asymmetric_loss(
            input,
            target,
            self.gamma_neg,
            self.gamma_pos,
            self.clip,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        ignored = "" if self.ignore_index == -100 else f", ignore_index={self.ignore_index}"
        given = f"gamma_neg={self.gamma_neg}, gamma_pos={self.gamma_pos}, clip={self.clip}"
        return f"{given}, reduction={self.reduction!r}{ignored}"
