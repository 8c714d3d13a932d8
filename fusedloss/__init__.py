"""Fused C++ kernels for the loss functions of PyTorch: drop-in replacements for the modules of ``torch.nn``."""

from . import functional
from ._library import check
from ._route import explain
from .custom import PointwiseLoss, pointwise_loss
from .modules import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FocalLoss,
    HuberLoss,
    L1Loss,
    MSELoss,
    NLLLoss,
    NLLLoss2d,
    SigmoidFocalLoss,
    SmoothL1Loss,
)

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "HuberLoss",
    "L1Loss",
    "MSELoss",
    "NLLLoss",
    "NLLLoss2d",
    "PointwiseLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "check",
    "explain",
    "functional",
    "pointwise_loss",
]
