"""Which names of which packages have a loss here, of the same arguments and results."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch.nn.functional as F

from .. import functional


class Place(NamedTuple):
    owner: Any  # a module of Python
    name: str
    ours: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


def _of_torch() -> Iterator[Place]:
    """The functions, which torch.nn's modules look up in every call."""
    for name in functional.__all__:
        if hasattr(F, name):
            yield Place(F, name, getattr(functional, name))


def _of_torchvision() -> Iterator[Place]:
    for module in ("torchvision.ops", "torchvision.ops.focal_loss"):
        yield Place(import_module(module), "sigmoid_focal_loss", functional.sigmoid_focal_loss)


_PACKAGES = {"torch": _of_torch, "torchvision": _of_torchvision}


def places(package: str) -> list[Place]:
    if package not in _PACKAGES:
        raise ValueError(f"expected one of {', '.join(map(repr, _PACKAGES))}, got {package!r}")
    return list(_PACKAGES[package]())
