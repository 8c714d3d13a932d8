"""The losses of whole rows as modules."""

import torch
from torch import nn

from . import functional
from ._scripted import as_native


class CosineEmbeddingLoss(nn.CosineEmbeddingLoss):
    """:class:`torch.nn.CosineEmbeddingLoss`, computed by :func:`fusedloss.functional.cosine_embedding_loss`.

    >>> CosineEmbeddingLoss()(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor(1))
    tensor(1.)
    """

    def forward(self, input1: torch.Tensor, input2: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.CosineEmbeddingLoss)


class TripletMarginLoss(nn.TripletMarginLoss):
    """:class:`torch.nn.TripletMarginLoss`, computed by :func:`fusedloss.functional.triplet_margin_loss`.

    >>> a, p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    >>> TripletMarginLoss(eps=0.0)(a, p, n)
    tensor(4.)
    """

    def forward(self, anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return functional.triplet_margin_loss(
            anchor, positive, negative,
            margin=self.margin, p=self.p, eps=self.eps, swap=self.swap, reduction=self.reduction,
        )  # fmt: skip

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.TripletMarginLoss)


class MultiMarginLoss(nn.MultiMarginLoss):
    """:class:`torch.nn.MultiMarginLoss`, computed by :func:`fusedloss.functional.multi_margin_loss`.

    >>> MultiMarginLoss()(torch.tensor([[0.5, 1.0, -1.0]]), torch.tensor([0]))
    tensor(0.5000)
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.multi_margin_loss(
            input, target, p=self.p, margin=self.margin, weight=self.weight, reduction=self.reduction
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return as_native(self, nn.MultiMarginLoss)
