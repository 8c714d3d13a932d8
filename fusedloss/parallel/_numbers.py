"""Parameters that are part of what each rank computes of its own classes."""

from typing import Any

from torch import Tensor

from ..losses._numbers import NUMBERS, checked


def fixed(function: str, name: str, value: Any) -> Any:
    """A number. A tensor's gradient would need a round of communication."""
    if isinstance(value, NUMBERS):
        return value
    value = checked(function, name, value)
    if isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be float, not a tensor; pass {name}.item()")
    return value
