"""What a benchmark is: one loss at one size, written by several providers, with the goals the kernels are held to."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .results import EAGER, Goal

Loss = Callable[[Tensor, Tensor], Tensor]  # (input, target) to the mean
Target = Callable[[Tensor, torch.Generator], Tensor]  # makes the target for an input, on the input's device

FORWARD, BACKWARD, BOTH, IN_FORWARD = "forward", "backward", "forward + backward", "forward + backward, grad_in_forward"
CALL = "a call, forward + backward"


Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """A call, and what is to be done untimed before each."""

    call: Call
    before: Call | None = None


@dataclass(frozen=True)
class Timing:
    """How one pass of a case is counted and judged."""

    passes: int  # over the input's elements, read or written once each; 0 where the cost of a call is what counts
    goals: list[Goal]
    count_target: bool = False  # the target's bytes count too
    row_bytes: int = 0  # what each row moves besides: its target and statistics
    fused: Loss | None = None  # used in place of the case's own fused loss


@dataclass(frozen=True)
class Case:
    """One loss at one size."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: Target
    losses: dict[str, Loss]  # by provider; "eager" and "fused" are always there
    timed: dict[str, Timing]  # by what is timed: forward, backward, ...
    device: str = "cpu"
    channels_last: bool = False
    probabilities: bool = False  # the input holds probabilities
    compiled: bool = True  # torch.compile is measured too
    by_rows: bool = False  # (N, C) cross-entropy, which other packages have too
    different: tuple[str, ...] = ()  # providers of another loss, whose gradient is not compared
    tensors: int = 0  # of the input's size that the greediest provider holds, to know what fits

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def most_bytes(self) -> int:
        return self.tensors * self.elements * self.dtype.itemsize

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        input = torch.randn(self.shape, generator=generator, device=self.device)
        if self.probabilities:
            input.div_(2).sigmoid_()  # without the 2, bfloat16 would round some to 1, where a slope may be 1e12
        input = input.to(self.dtype)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input.requires_grad_(), self.target(input, generator)

    def providers(self, compile: bool) -> list[str]:
        rest = [name for name in self.losses if name != EAGER]
        return [EAGER, *(["compile"] if compile and self.compiled else []), *rest]


def name_of(loss: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"{loss}-{kind}-{'x'.join(map(str, shape))}"
