"""What forward keeps of each loss for backward."""

import math

import torch
from torch import Tensor

from ._call import Call


def numbers(call: Call) -> int:
    """For each loss: the statistics of its row, of which max and sum_without_target are the first, and for a backward
    by classes the lse."""
    return int(call.known.saved_by(call.params)) + call.by_classes


def size(call: Call) -> int:
    return numbers(call) * math.prod(call.row_shape)


class Kept:
    """The numbers of the rows that count, one after the other, in memory of :func:`size`."""

    def __init__(self, call: Call, memory: Tensor) -> None:
        self.numbers = memory.view(numbers(call), *call.row_shape)
        self.has_lse = call.by_classes

    def put(self, start: int, end: int, statistics: Tensor, lse: Tensor) -> None:
        part = self.numbers[:, start:end]
        if self.has_lse:
            part[-1] = lse
            part = part[:-1]
        part.copy_(statistics[:-1].view_as(part))

    def statistics(self, start: int, end: int) -> Tensor:
        part = self.numbers[:, start:end]
        return for_kernel(part[:-1] if self.has_lse else part)


def for_kernel(numbers: Tensor) -> Tensor:
    """As a kernel takes them: the last is what a mean divides by, 1 for a sum."""
    return torch.cat([numbers.flatten(), numbers.new_ones(1)])
