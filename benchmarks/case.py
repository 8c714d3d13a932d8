"""What a benchmark is: one loss at one size, written by several providers, with the goals the kernels are held to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .results import EAGER, Goal

Inputs = tuple[Tensor, ...]  # what a gradient is taken of: the input, and a second one or the head
Loss = Callable[..., Tensor]  # (*inputs, target) to the mean
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

    def other_bytes(self, target: Tensor) -> int:
        """What counts beside the passes."""
        return (target.nbytes if self.count_target else 0) + self.row_bytes * target.numel()


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
    beside: Target | None = None  # makes a second input, of the first one's shape
    compiled: bool = True  # torch.compile is measured too
    classes: int = 0  # of a linear loss: its shape is that of hidden states (N, D), beside a head (classes, D)
    peers: str = ""  # which losses of other packages stand beside it: a key of peers.PEERS
    different: tuple[str, ...] = ()  # providers of another loss, whose gradient is not compared
    family: str = ""  # names the table of a CPU's figures that it belongs to
    tensors: int = 0  # of the logits' or the input's size that the greediest provider holds, to know what fits

    @property
    def head(self) -> tuple[int, ...]:
        return (self.classes, self.shape[1]) if self.classes else ()

    @property
    def logits(self) -> tuple[int, ...]:
        """What the loss itself is taken of."""
        return (self.shape[0], self.classes) if self.classes else self.shape

    @property
    def elements(self) -> int:
        """Of all inputs together."""
        return prod(self.shape) * (2 if self.beside else 1) + (prod(self.head) if self.head else 0)

    @property
    def flops(self) -> int:
        """Of a linear loss: a multiplication and an addition for each number of three matrix products."""
        return 6 * self.shape[0] * prod(self.head) if self.head else 0

    @property
    def most_bytes(self) -> int:
        return self.tensors * max(self.elements, prod(self.logits)) * self.dtype.itemsize

    def data(self) -> tuple[Inputs, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        input = torch.randn(self.shape, generator=generator, device=self.device)
        if self.probabilities:
            input.div_(2).sigmoid_()  # without the 2, bfloat16 would round some to 1, where a slope may be 1e12
        input = input.to(self.dtype)
        if self.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        inputs = [input]
        if self.head:
            head = torch.randn(self.head, generator=generator, device=self.device)
            inputs.append(head.div_(self.shape[1] ** 0.5).to(self.dtype))  # logits of about 1, as without a head
        if self.beside:
            inputs.append(self.beside(input, generator))
        target = self.target(input.new_empty(()).expand(self.logits) if self.head else input, generator)
        return tuple(each.requires_grad_() for each in inputs), target

    def providers(self, compile: bool) -> list[str]:
        rest = [name for name in self.losses if name != EAGER]
        return [EAGER, *(["compile"] if compile and self.compiled else []), *rest]


def name_of(loss: str, shape: Iterable[int], dtype: torch.dtype) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"{loss}-{kind}-{'x'.join(map(str, shape))}"
