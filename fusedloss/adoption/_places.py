"""Which names of which packages have a loss here, of the same arguments and results."""

from collections.abc import Callable
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


class Site(NamedTuple):
    """Where a package defines a loss: known before the package is imported."""

    module: str
    name: str  # in the module; of a class, its method
    ours: Callable[..., Any]

    def place(self) -> Place:
        owner: Any = import_module(self.module)
        *classes, name = self.name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        getattr(owner, name)  # an AttributeError here names what another version of the package lacks
        return Place(owner, name, self.ours)


# Not ``ForCausalLMLoss``: the Trainer asks whether a model's loss is that very function, to count the tokens.
_OF_TRANSFORMERS = [
    Site("transformers.loss.loss_utils", "fixed_cross_entropy", _transformers.fixed_cross_entropy),
    Site("transformers.trainer_pt_utils", "LabelSmoother.__call__", _transformers.smoothed),
    *(
        Site(f"transformers.loss.{module}", "sigmoid_focal_loss", _transformers.focal_of_queries)
        for module in ("loss_for_object_detection", "loss_deformable_detr", "loss_lw_detr", "loss_rt_detr")
    ),
    # Of the same name, with another mean.
    Site("transformers.loss.loss_grounding_dino", "sigmoid_focal_loss", _transformers.summed_focal),
]
SITES = {
    # The functions, which torch.nn's modules look up in every call.
    "torch": [
        Site("torch.nn.functional", name, getattr(functional, name)) for name in functional.__all__ if hasattr(F, name)
    ],
    "torchvision": [
        Site(module, "sigmoid_focal_loss", functional.sigmoid_focal_loss)
        for module in ("torchvision.ops", "torchvision.ops.focal_loss")
    ],
    "transformers": _OF_TRANSFORMERS,
    "timm": [
        Site("timm.loss", "LabelSmoothingCrossEntropy.forward", _timm.smoothed_cross_entropy),
        Site("timm.loss", "SoftTargetCrossEntropy.forward", _timm.soft_cross_entropy),
        Site("timm.loss", "BinaryCrossEntropy.forward", _timm.binary_cross_entropy),
    ],
}


def places(package: str) -> list[Place]:
    if package not in SITES:
        raise ValueError(f"expected one of {', '.join(map(repr, SITES))}, got {package!r}")
    return [site.place() for site in SITES[package]]
