"""The losses of distributions as modules."""

import torch
from torch import nn

from . import functional
from ._scripted import as_native


class KLDivLoss(nn.KLDivLoss):
    """:class:`torch.nn.KLDivLoss`, computed by :func:`fusedloss.functional.kl_div`.

    >>> KLDivLoss(reduction="batchmean")(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]))
    tensor(0.3681)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.KLDivLoss)


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """:class:`torch.nn.PoissonNLLLoss`, computed by :func:`fusedloss.functional.poisson_nll_loss`.

    >>> PoissonNLLLoss()(torch.tensor([0.0, 1.0]), torch.tensor([2, 3]))
    tensor(0.3591)
    """

    def forward(self, log_input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.PoissonNLLLoss)


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """:class:`torch.nn.GaussianNLLLoss`, computed by :func:`fusedloss.functional.gaussian_nll_loss`.

    >>> GaussianNLLLoss()(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0]))
    tensor(0.5966)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor, var: torch.Tensor | float) -> torch.Tensor:
        return functional.gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.GaussianNLLLoss)
