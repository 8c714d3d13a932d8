"""Matrix products with the gradient of the logits, whose results are rounded once.

On CUDA a product of half-precision data is made, and summed, in float32. On a CPU it comes in their own dtype.
"""

import torch
from torch import Tensor

from .._dtypes import HALVES
from ._chunks import PRODUCT_ELEMENTS, blocks, product_parts
from ._scale import Scale


def _in_float(data: Tensor) -> bool:
    return data.is_cuda and data.dtype in HALVES


def product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """``alpha`` times their product, which float16 might not hold without it."""
    made = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32 if _in_float(left) else left.dtype)
    _sum_products(made, left, right, 0, alpha)
    return made


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """``total``: in float32 for half-precision data."""
    if total.dtype == left.dtype or _in_float(left):
        _sum_products(total, left, right, 1, alpha)
    else:
        total.add_(product(left, right, alpha))


def _sum_products(total: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> None:
    """A beta of 0 reads nothing of what is there."""
    parts = product_parts(left.shape[1], left.dtype, "cuda") if _in_float(left) else [slice(None)]
    wide = {} if total.dtype == left.dtype else {"out_dtype": total.dtype}
    for part in parts:
        torch.addmm(total, left[:, part], right[part], beta=beta, alpha=alpha, out=total, **wide)
        beta = 1


def add_column_sums(total: Tensor, rows: Tensor, alpha: float) -> None:
    if rows.is_cuda:
        total.add_(rows.sum(0, dtype=total.dtype), alpha=alpha)
    else:  # there a sum into another dtype copies the rows
        add_product(total[None], rows.new_ones(1, rows.shape[0]), rows, alpha)


def write_product(result: Tensor, left: Tensor, right: Tensor, scale: Scale) -> None:
    """In place of what is there, which is not read."""
    if _in_float(left):
        factor = 1.0 if scale.factor is None else scale.factor
        for part in blocks(result.shape, PRODUCT_ELEMENTS):
            torch.mul(product(left[part], right, scale.alpha), factor, out=result[part])
    else:
        torch.addmm(result, left, right, beta=0, alpha=scale.alpha, out=result)
        scaled(result, scale.factor)


def scaled(data: Tensor, factor: Tensor | None) -> Tensor:
    """In place, by a number that half-precision data do not round first."""
    if factor is not None:
        torch.ops.fusedloss.scale_(data, factor)
    return data
