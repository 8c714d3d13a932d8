"""Class indices as targets of a pointwise loss, natively: the formula over a one-hot."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _torchs
from ._dtypes import in_float, widened
from ._sizes import same_shape


def over_class_indices(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``formula(input, target, weight, reduction, *params, **options)`` that also takes ``ignore_index``.

    Where that is given, targets are class indices (N) or (N, d1, ...) beside an input (N, C) or (N, C, d1, ...). A
    target is 1 in the column that the index names and 0 in every other; C, like every negative index, names none of
    them. Rows of ``ignore_index`` count nowhere, whatever their input.
    """

    def native(
        input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *params: Any,
        ignore_index: int | None = None, **options: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if ignore_index is None:
            return formula(input, target, weight, reduction, *params, **options)
        if input.dim() < 2 or not same_shape(target.shape, input.shape[:1] + input.shape[2:]):
            raise ValueError(
                f"Target size ({target.shape}) must be the same as input size ({input.shape}), "
                "or for class indices that of inputs (N, C, d1, ...) without C"
            )
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"{reduction} is not a valid value for reduction")
        x = in_float(input)
        classes = x.shape[1]
        kept = target != ignore_index
        index = torch.where(kept & (target >= 0), target, classes)
        # This only rejects, as torch does, what names no class: the background stands for one more.
        _torchs.nll_loss(x.new_zeros(1, 1).expand(index.numel(), classes + 1), index.flatten(), reduction="sum")
        columns = torch.arange(classes, device=x.device).view(-1, *[1] * (x.dim() - 2))
        one_hot = (index.unsqueeze(1) == columns).to(x.dtype)
        kept = kept.unsqueeze(1)
        wide = {name: factor if factor is None else factor.to(x.dtype) for name, factor in options.items()}
        factor = weight if weight is None else weight.to(x.dtype)
        losses = formula(torch.where(kept, x, 0), one_hot, factor, "none", *params, **wide)
        losses = torch.where(kept, losses, 0)
        if reduction != "none":
            losses = losses.sum() / (kept.sum() * classes) if reduction == "mean" else losses.sum()
        return losses.to(x.dtype if widened(input) else input.dtype)

    return native
