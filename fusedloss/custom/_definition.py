"""What defines a loss, its name and its parameters, and what was made of definitions so far."""

from collections.abc import Mapping
from numbers import Real
from threading import RLock
from typing import Any, NamedTuple

from torch import nn

from .. import _route
from ..losses._numbers import NUMBERS
from ._expression import Operands, check_parameters

Definition = tuple[str, str, str, tuple[tuple[str, float], ...]]  # name, value, grad, params


class Path(NamedTuple):
    """How a compiled loss is computed; losses that differ in their defaults alone share it."""

    native: _route.Formula
    routed: _route.Formula
    why_native: str


class OwnLoss(nn.Module):
    """What a module of one's own is, whatever its expression is of."""

    name: str
    value: str
    grad: str
    params: dict[str, float]
    why_native: str

    @property
    def fused(self) -> bool:
        return not self.why_native

    @property
    def _definition(self) -> Definition:
        return self.name, self.value, self.grad, tuple(self.params.items())

    def _undefined(self, defined: tuple[str, ...]) -> dict[str, Any]:
        """The attributes that do not follow from the definition, such as hooks: they are copied and pickled."""
        return {name: value for name, value in vars(self).items() if name not in defined}

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(f"{self.name}: TorchScript compiles no loss of your own; torch.jit.trace runs it natively")


LOCK = RLock()  # of several threads that make the same loss, one compiles and registers it
PATHS: dict[str, Path] = {}
CHECKED: set[str] = set()  # a registered loss whose check failed is checked again, with the next defaults

_LONGEST_NAME = 100  # beside two hashes, in the name of a file


def checked_params(name: str, params: Mapping[str, float], operands: Operands, most: int) -> dict[str, float]:
    if not name.isidentifier() or not name.isascii():
        raise ValueError(f"expected an identifier for the name of a loss, got {name!r}")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"expected at most {_LONGEST_NAME} letters in the name of a loss, got {len(name)}")
    if not isinstance(params, Mapping):
        raise TypeError(f"{name}: params must map names to their defaults, got {type(params).__name__}")
    if len(params) > most:
        raise ValueError(f"expected at most {most} parameters, got {len(params)}")
    check_parameters(params, operands)
    for parameter, value in params.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name}: the default of {parameter} must be a real number, got {type(value).__name__}")
    return {parameter: value if isinstance(value, NUMBERS) else float(value) for parameter, value in params.items()}


def names_known(name: str, given: Mapping[str, float], params: Mapping[str, float]) -> None:
    """Raises TypeError for a parameter that the loss does not have."""
    if unknown := given.keys() - params.keys():
        known = ", ".join(params) or "none"
        raise TypeError(f"{name}: unknown parameter {min(unknown)}; its parameters: {known}")
