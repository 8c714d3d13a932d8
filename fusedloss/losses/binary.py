"""Binary cross-entropy of probabilities and of logits."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _Reduction

from .. import _route

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits"]


@_route.pointwise("binary_cross_entropy", of_probabilities=True, class_indices=True)
def _binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return F.binary_cross_entropy(input, target, weight, reduction=reduction)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy of probabilities, as :func:`torch.nn.functional.binary_cross_entropy`.

    .. math:: \ell = -w \, (t \log x + (1 - t) \log (1 - x))

    with logarithms of at least -100.

    Args:
        input: probabilities x in [0, 1], any shape and strides; float32, float64, bfloat16 or float16.
        target: t in [0, 1], of the same shape and dtype.
        weight: a factor that broadcasts to the input, of its dtype.
        reduction: ``"mean"`` (over all elements, whatever their weight), ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: an input or a target is NaN or outside [0, 1] (on a GPU its loss is NaN instead), or the dtypes
            differ.
        ValueError: the sizes differ, or an unknown ``reduction``.

    >>> binary_cross_entropy(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
    tensor(0.1643)
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _binary_cross_entropy(input, target, weight, reduction)


@_route.pointwise("binary_cross_entropy_with_logits", class_indices=True)
def _binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *, pos_weight: Tensor | None = None
) -> Tensor:
    return F.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, as :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    .. math:: \ell = w \, (p \, t \, \mathrm{softplus}(-x) + (1 - t) \, \mathrm{softplus}(x))

    with :math:`\mathrm{softplus}(x) = \log(1 + e^x)`, to the last digits for logits of any size.

    Args:
        input: logits x, any shape and strides; float32, float64, bfloat16 or float16.
        target: t, of the same shape, in the input's dtype, or in float32 beside a bfloat16 or float16 input; the
            result has the target's dtype.
        weight: a factor w that broadcasts to the input.
        reduction: ``"mean"`` (over all elements, whatever their weight), ``"sum"`` or ``"none"``.
        pos_weight: a factor p of the positive term that broadcasts to the input, such as one for each class of
            (N, C), or (C, 1, 1) beside (N, C, H, W); it is read through its strides.

    Raises:
        RuntimeError: a weight that does not broadcast, or a target of an integer dtype.
        ValueError: the sizes differ, or an unknown ``reduction``.

    >>> binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2201)
    """
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return _binary_cross_entropy_with_logits(input, target, weight, reduction, pos_weight=pos_weight)
