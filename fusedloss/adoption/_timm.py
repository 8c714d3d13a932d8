"""What the losses of timm compute, in calls of ours. None leaves a call to the original."""

from typing import Any

import torch
from torch import Tensor

from .. import _route, functional
from .._dtypes import HALVES

_NONE_IGNORED = -(2**63)  # timm's losses raise for every class index out of range


def smoothed_cross_entropy(self: Any, x: Tensor, target: Tensor) -> Tensor | None:
    if x.dim() != 2:
        _route.tell_native("logits that are not (N, C)")
        return None
    return functional.cross_entropy(x, target, ignore_index=_NONE_IGNORED, label_smoothing=self.smoothing)


def soft_cross_entropy(self: Any, x: Tensor, target: Tensor) -> Tensor | None:
    if x.shape != target.shape:
        _route.tell_native("probabilities that are not of the logits' shape")
        return None
    classes = x.shape[-1]
    return functional.cross_entropy(x.reshape(-1, classes), target.reshape(-1, classes))


def binary_cross_entropy(self: Any, x: Tensor, target: Tensor) -> Tensor | None:
    """Class indices stay what they are, and their one-hot is not made, where ours gives the same."""
    if x.dim() != 2 or (target.shape != x.shape and target.shape not in ((len(x),), (len(x), 1))):
        _route.tell_native("logits that are not (N, C), or targets of another shape")
        return None
    classes, threshold = x.shape[1], self.target_threshold
    options: dict[str, Any] = {"pos_weight": self.pos_weight}
    if target.shape != x.shape:
        target = target.long().view(-1)
        off = self.smoothing / classes
        on = 1 - self.smoothing + off
        hard = (off, on) == (0, 1) if threshold is None else off <= threshold < on
        # timm rounds soft ones to a half type, which ours does not; beside a pos_weight those run natively.
        if hard or (x.dtype not in HALVES and self.pos_weight is None):
            # Out of range, which is no background here, it raises.
            target = torch.where((target >= 0) & (target < classes), target, classes + 1)
            options |= {"label_smoothing": self.smoothing, "target_threshold": threshold}
            options["ignore_index"] = _NONE_IGNORED
            threshold = None
        else:
            target = torch.full_like(x, off, requires_grad=False).scatter_(1, target[:, None], on)
    elif getattr(self, "smooth_dense", False) and self.smoothing:
        target = target * (1 - self.smoothing) + 0.5 * self.smoothing
    if threshold is not None:
        target = target.gt(threshold).to(target.dtype)
    loss = functional.binary_cross_entropy_with_logits
    if getattr(self, "sum_classes", False):
        return loss(x, target, self.weight, reduction="sum", **options) / len(x)
    return loss(x, target, self.weight, reduction=self.reduction, **options)
