"""Fused C++ kernels for the loss functions of PyTorch: drop-in replacements for the modules of ``torch.nn``."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._collector import paused

with paused():
    from . import functional
    from ._distillation_module import DistillationLoss
    from ._library import by_accident, check, why_native
    from ._linear_distillation_module import LinearDistillationLoss
    from ._linear_module import LinearCrossEntropyLoss
    from ._route import explain
    from .adoption import patch, scope
    from .custom import PointwiseLoss, SoftmaxLoss, pointwise_loss, softmax_loss
    from .modules import (
        AsymmetricLoss,
        BCELoss,
        BCEWithLogitsLoss,
        CosineEmbeddingLoss,
        CrossEntropyLoss,
        FocalLoss,
        GaussianNLLLoss,
        HingeEmbeddingLoss,
        HuberLoss,
        KLDivLoss,
        L1Loss,
        MarginRankingLoss,
        MSELoss,
        MultiLabelSoftMarginLoss,
        MultiMarginLoss,
        NLLLoss,
        NLLLoss2d,
        PoissonNLLLoss,
        SigmoidFocalLoss,
        SmoothL1Loss,
        SoftMarginLoss,
        TripletMarginLoss,
    )

__version__ = "0.1.0"

__all__ = [
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "FocalLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "MarginRankingLoss",
    "MSELoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "NLLLoss2d",
    "PointwiseLoss",
    "PoissonNLLLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "SoftmaxLoss",
    "TripletMarginLoss",
    "check",
    "explain",
    "functional",
    "patch",
    "pointwise_loss",
    "scope",
    "softmax_loss",
]

if by_accident:
    warnings.warn(f"fusedloss runs in native PyTorch: {why_native}", stacklevel=2)


def __dir__() -> list[str]:
    """Without the modules that the package is made of, which may change."""
    return [*__all__, "parallel", *(name for name in globals() if name.startswith("__"))]


if TYPE_CHECKING:  # which would take every name for one that exists
    from . import parallel as parallel
else:

    def __getattr__(name: str) -> Any:
        if name == "parallel":  # imports torch's collectives, which a single process does without
            return import_module(".parallel", __name__)
        hint = f"; use fusedloss.functional.{name}" if name in functional.__all__ else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
