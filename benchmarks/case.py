"""What a benchmark is: one loss at one size, as it is written today and fused, with the goals it is held to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # (input, target) to the mean


@dataclass(frozen=True)
class Case:
    """One loss at one size. A goal is a least speed-up, or a most memory in multiples of the input's bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: Callable[[Tensor, torch.Generator], Tensor]
    eager: Loss
    fused: Loss
    native: Loss | None = None  # the formula fusedloss falls back to, where it is not `eager` itself
    peer: tuple[str, Loss] | None = None  # another loss to compare with
    speedup: float | None = None
    over: str = "eager"
    over_compile: float | None = None
    memory: float | None = None
    channels_last: bool = False
    probabilities: bool = False  # as inputs
    compiled: bool = True  # torch.compile is measured too

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(self.shape, generator=generator).to(self.dtype)
        if self.probabilities:
            input = input.float().sigmoid().to(self.dtype)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input.requires_grad_(), self.target(input, generator)

    def losses(self) -> dict[str, Loss]:
        """The loss of every provider that needs no compiler."""
        losses = {"eager": self.eager, "fused": self.fused}
        if self.native is not None:
            losses["native"] = self.native
        if self.peer is not None:
            losses[self.peer[0]] = self.peer[1]
        return losses


def minimum_traffic(input: Tensor, target: Tensor) -> int:
    """Bytes that forward and backward must move: input and target read once, the gradient written once."""
    return 2 * input.nbytes + target.nbytes


def values(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(input.shape, generator=generator).to(input.dtype)


def zeros_and_ones(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, input.shape, generator=generator).to(input.dtype)


def name_of(loss: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"{loss}-{kind}-{'x'.join(map(str, shape))}"
