"""What the losses of transformers compute, in calls of ours. None leaves a call to the original."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _route, functional
from .._dtypes import HALVES
from ._replacement import knows_originals


def fixed_cross_entropy(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    """Through it pass the losses of the models for causal and masked language, tokens, sequences and answers."""
    if num_items_in_batch is None:
        return functional.cross_entropy(source, target, ignore_index=ignore_index)
    loss = functional.cross_entropy(source, target, ignore_index=ignore_index, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def smoothed(
    self: Any,
    model_output: Any,
    labels: Tensor,
    shift_labels: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor | None:
    """``LabelSmoother``, which takes negative labels for class 0."""
    logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
    if knows_originals((logits, labels)):
        return None
    if labels.shape != logits.shape[:-1]:
        _route.tell_native("labels that are not one for each row of logits")
        return None
    ignored, classes = self.ignore_index, logits.shape[-1]
    if shift_labels:  # the labels, where the original shifts and copies the logits
        labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)
    labels = torch.where(labels == ignored, labels, labels.clamp(min=0))
    loss = functional.cross_entropy(
        logits.reshape(-1, classes),
        labels.reshape(-1),
        ignore_index=ignored,
        reduction="mean" if num_items_in_batch is None else "sum",
        label_smoothing=self.epsilon,
        out_dtype=torch.float32 if logits.dtype in HALVES else None,
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def summed_focal(
    inputs: Tensor, targets: Tensor, num_boxes: Tensor | float, alpha: float = 0.25, gamma: float = 2
) -> Tensor | None:
    if not targets.is_floating_point():  # class indices to us
        _route.tell_native("targets of an integer dtype")
        return None
    return functional.sigmoid_focal_loss(inputs, targets, alpha, gamma, "sum") / num_boxes


def focal_of_queries(
    inputs: Tensor, targets: Tensor, num_boxes: Tensor | float, alpha: float = 0.25, gamma: float = 2
) -> Tensor | None:
    """A mean over the second dimension, summed over the others."""
    total = summed_focal(inputs, targets, num_boxes, alpha, gamma)
    return None if total is None else total / inputs.shape[1]
