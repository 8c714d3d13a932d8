"""Binary cross-entropy of probabilities and of logits."""

from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _route, _torchs
from ._elementwise import INDEX_DTYPES, check_broadcasts

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_logits"]


@_route.pointwise("binary_cross_entropy", of_probabilities=True, class_indices=True)
def _binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return _torchs.binary_cross_entropy(input, target, weight, reduction=reduction)


@_route.pointwise("binary_cross_entropy_with_logits", class_indices=True)
def _binary_cross_entropy_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, *, pos_weight: Tensor | None = None
) -> Tensor:
    return _torchs.binary_cross_entropy_with_logits(input, target, weight, reduction=reduction, pos_weight=pos_weight)


def _class_indices(target: Tensor) -> Tensor:
    if target.dtype not in INDEX_DTYPES:
        raise ValueError(f"ignore_index needs class indices of an integer dtype for targets, got {target.dtype}")
    return target.long()


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Binary cross-entropy of probabilities, as :func:`torch.nn.functional.binary_cross_entropy`.

    .. math:: \ell = -w \, (t \log x + (1 - t) \log (1 - x))

    with logarithms of at least -100.

    With an ``ignore_index`` the targets are class indices y, and the result is that of their one-hot, which the kernels
    never build: :math:`t_c` is 1 in the column c = y and 0 in every other. The number of classes C, like every negative
    number but ``ignore_index``, is the background: t is 0 in all columns.

    Args:
        input: probabilities x in [0, 1], any shape and strides; (N, C) or (N, C, d1, ...) for class indices. float32,
            float64, bfloat16 or float16.
        target: t in [0, 1], of the same shape and dtype. With an ``ignore_index``: class indices (N) or (N, d1, ...) in
            int64, or in another integer dtype, which is converted.
        weight: a factor that broadcasts to the input, of its dtype.
        reduction: ``"mean"`` (over all elements that are not ignored, whatever their weight), ``"sum"`` or ``"none"``
            (the shape of the input).
        ignore_index: class indices of this value count nowhere and get no gradient, whatever the input. ``None``: the
            targets are no class indices, and everything is as in torch.

    Raises:
        RuntimeError: an input or a target is NaN or outside [0, 1] (on a GPU its loss is NaN instead), or the dtypes
            differ.
        ValueError: the sizes do not fit, an unknown ``reduction``, or an ``ignore_index`` beside targets that are no
            integers.
        IndexError: a class index is above C and not ``ignore_index``. On a GPU the losses of its row are NaN instead,
            and the next forward outside a replayed graph or :func:`fusedloss.check` raises.

    >>> binary_cross_entropy(torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0]))
    tensor(0.1643)

    A row of class 1, a background and an ignored row:

    >>> x = torch.tensor([[0.5, 0.9], [0.5, 0.2], [0.5, 0.5]])
    >>> binary_cross_entropy(x, torch.tensor([1, 2, -100]), reduction="none", ignore_index=-100)
    tensor([[0.6931, 0.1054],
            [0.6931, 0.2231],
            [0.0000, 0.0000]])
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return handle_torch_function(
            binary_cross_entropy, (input, target, weight), input, target, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction, ignore_index=ignore_index,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if ignore_index is None:
        return _binary_cross_entropy(input, target, weight, reduction)
    check_broadcasts("weight", weight, input)
    return _binary_cross_entropy(input, _class_indices(target), weight, reduction, ignore_index=ignore_index)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Binary cross-entropy of logits, as :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    .. math:: \ell = w \, (p \, t \, \mathrm{softplus}(-x) + (1 - t) \, \mathrm{softplus}(x))

    with :math:`\mathrm{softplus}(x) = \log(1 + e^x)`, accurate to the last digits for logits of any size.

    With an ``ignore_index`` the targets are class indices, as :func:`binary_cross_entropy` explains them.

    Args:
        input: logits x, any shape and strides; (N, C) or (N, C, d1, ...) for class indices. float32, float64, bfloat16
            or float16.
        target: t, of the same shape, in the input's dtype, or in float32 beside a bfloat16 or float16 input; the
            result has the target's dtype. With an ``ignore_index``: class indices (N) or (N, d1, ...) in int64, or in
            another integer dtype, which is converted; the result has the input's dtype, under autocast float32.
        weight: a factor w that broadcasts to the input.
        reduction: ``"mean"`` (over all elements that are not ignored, whatever their weight), ``"sum"`` or ``"none"``
            (the shape of the input).
        pos_weight: a factor p of the positive term that broadcasts to the input, such as one for each class: (C) beside
            (N, C), or (C, 1, 1) beside (N, C, H, W). It is read through its strides.
        ignore_index: class indices of this value count nowhere and get no gradient, whatever the logits. ``None``: the
            targets are no class indices, and everything is as in torch.

    Raises:
        RuntimeError: a weight that does not broadcast, or, without ``ignore_index``, a target of an integer dtype.
        ValueError: the sizes do not fit, an unknown ``reduction``, or an ``ignore_index`` beside targets that are no
            integers or a weight that does not broadcast.
        IndexError: a class index is out of range, as for :func:`binary_cross_entropy`.

    >>> binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2201)

    A row of class 1, a background and an ignored row:

    >>> x = torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.0, 0.0]])
    >>> binary_cross_entropy_with_logits(x, torch.tensor([1, 2, -100]), reduction="none", ignore_index=-100)
    tensor([[0.6931, 0.1269],
            [0.6931, 0.3133],
            [0.0000, 0.0000]])
    """
    if has_torch_function_variadic(input, target, weight, pos_weight) and _route.overrides_apply():
        return handle_torch_function(
            binary_cross_entropy_with_logits, (input, target, weight, pos_weight), input, target, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction, pos_weight=pos_weight,
            ignore_index=ignore_index,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    loss = _binary_cross_entropy_with_logits
    if ignore_index is None:
        return loss(input, target, weight, reduction, pos_weight=pos_weight)
    check_broadcasts("weight", weight, input)
    check_broadcasts("pos_weight", pos_weight, input)
    return loss(input, _class_indices(target), weight, reduction, pos_weight=pos_weight, ignore_index=ignore_index)
