"""What all gradients are multiplied by: the upstream gradient over what a mean divides by.

The kernels make gradients of the sum of the losses. There the target's term is -1 but for a small number, which half
types hold exactly. The rest comes in where the products with these gradients are rounded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._call import MEAN, MEAN_OR_ZERO, Call
from ._rows import Rows

# A float16 gradient of the logits is made this many times as large, so that small probabilities do not underflow.
OF_HALF = 2.0**8
# The largest float16 is 2**16. A gradient that is in range for this lse is in range for each lse of float16 logits.
_LSE = 2.0**9


class Scale(NamedTuple):
    alpha: float  # in the matrix products, where it costs nothing
    factor: Tensor | None = None  # a number that the host need not know


def of_kernel(call: Call) -> Tensor | None:
    """A power of two that keeps a float16 gradient of the logits in range. None: other types need nothing."""
    if call.input.dtype != torch.float16:
        return None
    largest = call.input.new_ones((), dtype=torch.float64)
    for factor in (call.weight, call.sample_weight):
        if factor is not None and factor.numel() > 0:
            largest = largest * factor.double().abs().max().clamp_min(1)
    if call.loss == "focal":
        alpha, gamma = call.params
        largest = largest * max(1.0, abs(alpha)) * (1 + gamma)
    else:
        _, z_loss, _ = call.params
        largest = largest * (1 + 2 * abs(z_loss) * _LSE)
    return torch.exp2(torch.log2(OF_HALF / largest).floor())


def of_reduction(call: Call, rows: Rows, upstream: Tensor | None, kernel: Tensor | None = None) -> Scale:
    """For gradients of the logits that are ``kernel`` times those of the sum of the losses."""
    factor: Tensor | None = None if upstream is None else upstream.double()
    if call.reduction in (MEAN, MEAN_OR_ZERO):
        factor = rows.share(upstream)
    if factor is None:
        return Scale(call.logit_scale)
    if kernel is not None:
        factor = factor / kernel
    if call.on_host:
        return Scale(call.logit_scale * float(factor))
    # Without the known part, products might overflow before the factor comes in.
    known = 1.0 if kernel is None else OF_HALF
    return Scale(call.logit_scale / known, (factor * known).to(call.arithmetic))
