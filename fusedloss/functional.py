"""The losses as functions, with the names and positional arguments of ``torch.nn.functional``."""

from .losses.binary import binary_cross_entropy, binary_cross_entropy_with_logits
from .losses.cross_entropy import cross_entropy
from .losses.difference import huber_loss, l1_loss, mse_loss, smooth_l1_loss
from .losses.focal import focal_loss
from .losses.log_probs import log_probs
from .losses.nll import nll_loss
from .losses.sigmoid_focal import sigmoid_focal_loss

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "focal_loss",
    "huber_loss",
    "l1_loss",
    "log_probs",
    "mse_loss",
    "nll_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]
