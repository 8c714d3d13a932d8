"""What torch.compile asks once, while it traces, and does not trace itself.

Whatever it traces, it checks before every later call: each function, each global and attribute of a module outside
torch. For a small loss that took as long as the loss. So traced code hands over constants that describe its tensors,
and a function that the compiler does not look into answers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ._sizes import pinned


def is_exporting() -> bool:
    """As torch.compiler's, which torch.compile of torch 2.11 takes for True."""
    return torch.compiler._is_exporting_flag


class Described(NamedTuple):
    """All that is known of a tensor but its numbers."""

    type_name: str
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    shape: torch.Size
    requires_grad: bool

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)  # the method of torch.Size pins down what torch.export keeps open


def described(values: Any) -> list[Any] | None:
    """Constants for tensors and numbers; None where the compiler keeps a number or a size open."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    constants: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if not has_static_value(value.numel()):
                return None
            constants.append(
                (type(value).__name__, value.dtype, value.device, value.layout, value.shape, value.requires_grad)
            )
        elif value is None or isinstance(value, str) or has_static_value(value):
            constants.append(value)
        else:
            return None
    return constants


def asked_once(
    function: Callable[..., Any],
) -> Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]:
    """What ``function(*call, *numbers)`` answers, and the numbers.

    Where the compiler keeps nothing of them open, it calls the function once, with constants, and does not trace it.
    Otherwise the function is traced, of numbers that the graph then holds fixed.
    """

    def answer(constants: list[Any]) -> Any:
        return function(*(Described(*each) if isinstance(each, tuple) else each for each in constants))

    # What torch.compiler.assume_constant_result does, which imports the compiler: a second that eager users keep.
    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def ask(call: tuple[Any, ...], numbers: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        constants = described((*call, *numbers))
        if constants is not None:
            return answer(constants), numbers
        numbers = tuple(map(pinned, numbers))
        return function(*call, *numbers), numbers

    return ask
