"""Matrix products with the gradient of the logits, whose results are rounded once.

On CUDA a product of half-precision data is made, and summed, in float32. On a CPU it comes in their own dtype.
"""

import torch
from torch import Tensor

from .._dtypes import HALVES
from ._chunks import PRODUCT_ELEMENTS, blocks
from ._scale import Scale


def _in_float(data: Tensor) -> bool:
    return data.is_cuda and data.dtype in HALVES


def product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """``alpha`` times their product, which float16 might not hold without it."""
    if _in_float(left):
        made = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
        return torch.addmm(made, left, right, out_dtype=torch.float32, beta=0, alpha=alpha, out=made)
    made = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(made, left, right, beta=0, alpha=alpha, out=made)


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """``total``: in float32 for half-precision data."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=alpha)
    elif _in_float(left):
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=alpha, out=total)
    else:
        total.add_(product(left, right, alpha))


def add_column_sums(total: Tensor, rows: Tensor, alpha: float) -> None:
    if rows.is_cuda:
        total.add_(rows.sum(0, dtype=total.dtype), alpha=alpha)
    else:  # there a sum into another dtype copies the rows
        add_product(total[None], rows.new_ones(1, rows.shape[0]), rows, alpha)


def write_product(result: Tensor, left: Tensor, right: Tensor, scale: Scale) -> None:
    """In place of what is there, which is not read."""
    if scale.factor is None:
        torch.addmm(result, left, right, beta=0, alpha=scale.alpha, out=result)
    elif _in_float(left):
        for part in blocks(result.shape, PRODUCT_ELEMENTS):
            torch.mul(product(left[part], right, scale.alpha), scale.factor, out=result[part])
    else:
        torch.addmm(result, left, right, beta=0, alpha=scale.alpha, out=result)
        scaled(result, scale.factor)


def scaled(data: Tensor, factor: Tensor | None) -> Tensor:
    """In place, by a number that half-precision data do not round first."""
    if factor is not None:
        torch.ops.fusedloss.scale_(data, factor)
    return data
