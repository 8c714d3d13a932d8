"""Fused C++ kernels for the loss functions of PyTorch: drop-in replacements for the modules of ``torch.nn``."""

from . import functional
from ._library import check
from ._route import explain
from .modules import CrossEntropyLoss, FocalLoss, HuberLoss, NLLLoss, NLLLoss2d, SigmoidFocalLoss

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "FocalLoss",
    "HuberLoss",
    "NLLLoss",
    "NLLLoss2d",
    "SigmoidFocalLoss",
    "check",
    "explain",
    "functional",
]
