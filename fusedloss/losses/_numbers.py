"""Parameters that torch does not have: what is no number is named in torch's words."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

NUMBERS = (float, int)  # what the kernels take; all else goes through `checked`


def checked(function: str, name: str, value: Any) -> Any:
    """A real number of another type, or a tensor of one real number, which runs natively and may require a gradient.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.reshape(()) if value.dim() else value  # a Parameter without dimensions stays one
    elif isinstance(value, NUMBERS):
        return value
    elif isinstance(value, Real):
        return float(value)
    raise TypeError(f"{function}(): argument '{name}' must be float, not {_described(value)}")


def refuse_others(function: str, **given: Any) -> None:
    """What is no tensor, in torch's words."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return type(value).__name__


def factors_of_classes(function: str, name: str, value: Sequence[float], **placed: Any) -> Tensor:
    """A list or tuple of numbers as a tensor."""
    for factor in value:
        if not isinstance(factor, NUMBERS):
            raise TypeError(f"{function}(): argument '{name}' must hold floats, got {type(factor).__name__}")
    return torch.tensor(value, **placed)
