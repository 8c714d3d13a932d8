"""The losses of labels and margins as modules."""

import torch
from torch import nn

from . import functional
from ._scripted import as_native


class HingeEmbeddingLoss(nn.HingeEmbeddingLoss):
    """:class:`torch.nn.HingeEmbeddingLoss`, computed by :func:`fusedloss.functional.hinge_embedding_loss`.

    >>> HingeEmbeddingLoss(margin=2.0)(torch.tensor([0.5, 0.5]), torch.tensor([1, -1]))
    tensor(1.)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.HingeEmbeddingLoss)


class SoftMarginLoss(nn.SoftMarginLoss):
    """:class:`torch.nn.SoftMarginLoss`, computed by :func:`fusedloss.functional.soft_margin_loss`.

    >>> SoftMarginLoss()(torch.tensor([2.0, 2.0]), torch.tensor([1, -1]))
    tensor(1.1269)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.soft_margin_loss(input, target, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.SoftMarginLoss)


class MultiLabelSoftMarginLoss(nn.MultiLabelSoftMarginLoss):
    """:class:`torch.nn.MultiLabelSoftMarginLoss`, computed by :func:`fusedloss.functional.multilabel_soft_margin_loss`.

    >>> MultiLabelSoftMarginLoss()(torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[1, 0], [0, 1]]))
    tensor(0.4566)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.multilabel_soft_margin_loss(input, target, weight=self.weight, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.MultiLabelSoftMarginLoss)


class MarginRankingLoss(nn.MarginRankingLoss):
    """:class:`torch.nn.MarginRankingLoss`, computed by :func:`fusedloss.functional.margin_ranking_loss`.

    >>> MarginRankingLoss(margin=1.0)(torch.tensor([2.0, 1.0]), torch.tensor([1.5, 3.0]), torch.tensor([1, -1]))
    tensor(0.2500)
    """

    def forward(self, input1: torch.Tensor, input2: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.margin_ranking_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.MarginRankingLoss)
