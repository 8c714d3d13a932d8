"""Which names of which packages have a loss here, of the same arguments and results."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch.nn.functional as F

from .. import functional
from . import _timm, _transformers


class Place(NamedTuple):
    owner: Any  # a module of Python, or a class
    name: str
    ours: Callable[..., Any]

    @property
    def path(self) -> str:
        """Of the owner."""
        if isinstance(self.owner, type):
            return f"{self.owner.__module__}.{self.owner.__qualname__}"
        return str(self.owner.__name__)

    def __str__(self) -> str:
        return f"{self.path}.{self.name}"


def _of_torch() -> Iterator[Place]:
    """The functions, which torch.nn's modules look up in every call."""
    for name in functional.__all__:
        if hasattr(F, name):
            yield Place(F, name, getattr(functional, name))


def _of_torchvision() -> Iterator[Place]:
    for module in ("torchvision.ops", "torchvision.ops.focal_loss"):
        yield Place(import_module(module), "sigmoid_focal_loss", functional.sigmoid_focal_loss)


def _of_timm() -> Iterator[Place]:
    losses = import_module("timm.loss")
    yield Place(losses.LabelSmoothingCrossEntropy, "forward", _timm.smoothed_cross_entropy)
    yield Place(losses.SoftTargetCrossEntropy, "forward", _timm.soft_cross_entropy)
    yield Place(losses.BinaryCrossEntropy, "forward", _timm.binary_cross_entropy)


_QUERIES = ("loss_for_object_detection", "loss_deformable_detr", "loss_lw_detr", "loss_rt_detr")


def _of_transformers() -> Iterator[Place]:
    """Not ``ForCausalLMLoss``: the Trainer asks whether a model's loss is that very function, to count the tokens."""
    yield Place(import_module("transformers.loss.loss_utils"), "fixed_cross_entropy", _transformers.fixed_cross_entropy)
    yield Place(import_module("transformers.trainer_pt_utils").LabelSmoother, "__call__", _transformers.smoothed)
    # The same name is in several modules, and one of them has another mean.
    focal = {f"transformers.loss.{module}": _transformers.focal_of_queries for module in _QUERIES}
    focal["transformers.loss.loss_grounding_dino"] = _transformers.summed_focal
    for module, ours in focal.items():
        yield Place(import_module(module), "sigmoid_focal_loss", ours)


_PACKAGES = {"torch": _of_torch, "torchvision": _of_torchvision, "transformers": _of_transformers, "timm": _of_timm}


def places(package: str) -> list[Place]:
    if package not in _PACKAGES:
        raise ValueError(f"expected one of {', '.join(map(repr, _PACKAGES))}, got {package!r}")
    return list(_PACKAGES[package]())
