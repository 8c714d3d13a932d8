"""Cross-entropy of class indices and of class probabilities.

:func:`fusedloss._route.softmax` explains the formulas' options ``wide``, ``second`` and ``zero``.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs
from .._dtypes import in_float, widened
from ._dtensors import is_dtensor, served
from ._ignored import IgnoreIndex, is_one, with_one_index
from ._numbers import NUMBERS, checked
from ._rows import class_dim, class_index, reduced

__all__ = ["cross_entropy"]


def capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), but a logit of -infinity, which masks its class, stays. 0 caps nothing."""
    return torch.where(logits == -torch.inf, logits, softcap * torch.tanh(logits / softcap)) if softcap else logits


@_route.softmax("cross_entropy", left="few", mean_by_weight=True)
def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    if getattr(target, "shape", None) != getattr(logits, "shape", None):  # or torch names the dtype that it was given
        target = class_index(target)
    if not (z_loss or softcap or wide or second or zero):
        return _torchs.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )
    z = capped(in_float(logits), softcap)
    weight = weight if weight is None else weight.to(z.dtype)
    losses = _torchs.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )  # fmt: skip
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    kept = target != ignore_index
    lse = z.logsumexp(class_dim(z))
    if z_loss:
        losses = losses + torch.where(kept, z_loss * lse.square(), 0.0)
    divisor = kept.sum() if weight is None else weight[torch.where(kept, target, 0).long()].where(kept, 0.0).sum()
    dtype = z.dtype if widened(logits, wide) else logits.dtype
    loss = reduced(losses, divisor, reduction, zero).to(dtype)
    return (loss, lse.to(dtype)) if second else loss


@_route.softmax("soft_cross_entropy", left="few", soft=True)
def _soft_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
    *, wide: bool = False, second: bool = False, zero: bool = False,
) -> Any:  # fmt: skip
    if not (z_loss or softcap or wide or second):
        return _torchs.cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
        )
    z = capped(in_float(logits), softcap)
    dtype = torch.promote_types(z.dtype if widened(logits, wide) else logits.dtype, target.dtype)
    target = target.to(torch.promote_types(z.dtype, target.dtype))
    losses = _torchs.cross_entropy(
        z, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )  # fmt: skip
    if reduction not in _route.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    lse = z.logsumexp(class_dim(z))
    losses = losses + z_loss * lse.square()
    loss = losses.mean() if reduction == "mean" else reduced(losses, losses, reduction, zero)
    return (loss.to(dtype), lse.to(dtype)) if second else loss.to(dtype)


def checked_options(
    function: str, z_loss: Any, softcap: Any, all_ignored: str, out_dtype: torch.dtype | None
) -> Any:  # fmt: skip
    """The softcap as the formula takes it, 0 for none."""
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if softcap is not None and not isinstance(softcap, NUMBERS):
        softcap = checked(function, "softcap", softcap)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if all_ignored not in ("nan", "zero"):
        raise ValueError(f'all_ignored must be "nan" or "zero", got {all_ignored!r}')
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{function}(): argument 'out_dtype' must be torch.dtype, not {type(out_dtype).__name__}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be a floating point type, got {out_dtype}")
    return 0.0 if softcap is None or softcap == math.inf else softcap


# fmt: off
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: IgnoreIndex = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ...,
    *, sample_weight: Tensor | None = ..., z_loss: float = ..., softcap: float | None = ...,
    out_dtype: torch.dtype | None = ..., all_ignored: str = ..., return_lse: Literal[False] = ...,
    grad_in_forward: bool | None = ..., inplace: bool = ...,
) -> Tensor: ...

@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: IgnoreIndex = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ...,
    *, sample_weight: Tensor | None = ..., z_loss: float = ..., softcap: float | None = ...,
    out_dtype: torch.dtype | None = ..., all_ignored: str = ..., return_lse: Literal[True],
    grad_in_forward: bool | None = ..., inplace: bool = ...,
) -> tuple[Tensor, Tensor]: ...

@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: IgnoreIndex = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ...,
    *, sample_weight: Tensor | None = ..., z_loss: float = ..., softcap: float | None = ...,
    out_dtype: torch.dtype | None = ..., all_ignored: str = ..., return_lse: bool,
    grad_in_forward: bool | None = ..., inplace: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: IgnoreIndex = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
    all_ignored: str = "nan",
    return_lse: bool = False,
    grad_in_forward: bool | None = None,
    inplace: bool = False,
) -> Any:
    r"""Cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`.

    With :math:`\mathrm{lse} = \log \sum_c e^{x_c}`, smoothing :math:`\epsilon` and class indices y

    .. math:: \ell = (1 - \epsilon) \, w_y (\mathrm{lse} - x_y)
              + \tfrac{\epsilon}{C} \sum_c w_c (\mathrm{lse} - x_c) + \lambda \, \mathrm{lse}^2

    and with class probabilities t, smoothed to :math:`t_c (1 - \epsilon) + \epsilon / C`,

    .. math:: \ell = \sum_c w_c t_c (\mathrm{lse} - x_c) + \lambda \, \mathrm{lse}^2

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16, read in place whatever
            their strides.
        target: class indices (), (N) or (N, d1, ...) in int64 or uint8, or class probabilities of the input's shape, in
            its dtype or float32.
        weight: a factor for each of the C classes; the mean then divides by the sum of the targets' weights.
        ignore_index: class indices of this value, or of one of these values, count nowhere and get no gradient. Or a
            bool tensor that is True for the rows that are ignored, beside probabilities too. Several values and a mask
            cost a copy of the class indices.
        sample_weight: a factor s for each row, in the shape of class indices and any floating point dtype. A row's
            whole loss is multiplied by it, and the mean is :math:`\sum_i s_i \ell_i / \sum_i s_i w_{y_i}`, beside
            probabilities :math:`\sum_i s_i \ell_i / \sum_i s_i`. A row of weight 0 is as an ignored one, whatever its
            logits. With weights that require a gradient the loss runs natively.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: :math:`\epsilon` in [0, 1].
        z_loss: :math:`\lambda`, at least 0: a row that is not ignored adds :math:`\lambda \, \mathrm{lse}^2`.
        softcap: takes ``softcap * tanh(input / softcap)`` for the logits. A logit of -infinity stays -infinity, so that
            it still masks its class; a softcap of infinity caps nothing.
        out_dtype: the dtype of the results; the arithmetic is at least as precise. ``torch.float32`` gives a float32
            loss of bfloat16 logits without a copy of them.
        all_ignored: the mean where every row is ignored: ``"nan"``, as in torch, or ``"zero"``, with a gradient of 0.
        return_lse: returns ``(loss, lse)``, the differentiable lse of every row, ignored ones too, without weights.
        grad_in_forward: ``True`` computes the gradient in the forward pass, while it reads the logits: one read and one
            write of them in all. Backward multiplies it by the upstream gradient, which costs nothing where that is 1
            and a read and a write otherwise. ``False`` computes it in backward: two reads and one write. ``None`` is
            ``True`` on a CPU outside saved-tensor hooks (checkpointing, offloading), and otherwise ``False``. Where the
            upstream gradient is no power of two, a bfloat16 gradient is computed again, because the product would round
            it a second time. Ignored for float16 (an unscaled gradient would underflow), for ``reduction="none"``,
            with ``return_lse``, and where nothing requires a gradient.
        inplace: lets the gradient overwrite the logits, so that training needs O(N) memory beyond them. The logits keep
            their values until backward, or, with ``grad_in_forward=True``, only until this call returns. Their memory
            is the gradient that backward returns: what is written to them later changes it. Without grad mode nothing
            is overwritten, and under saved-tensor hooks nothing before backward. Like ``grad_in_forward`` it is ignored
            where the call runs natively.

    Raises:
        IndexError: a target is out of range and not ``ignore_index``. On a GPU the loss is NaN instead, and the next
            forward outside a replayed graph or :func:`fusedloss.check` raises.
        RuntimeError: ``inplace=True`` with logits that are a leaf requiring grad or a view of one, or that share memory
            among themselves, with the target or with the weights; or a backward through overwritten logits: a second
            one, one with ``create_graph=True``, or one over a batch of upstream gradients.
        ValueError: ``z_loss`` is negative, ``softcap`` is not positive, ``out_dtype`` or ``all_ignored`` is unknown,
            or ``sample_weight`` or a mask is not of the rows' shape, or the weights of another device or of integers.
        TypeError: ``z_loss`` or ``softcap`` is no number, nor a tensor of one; one of several ``ignore_index`` is no
            int; ``sample_weight`` is no tensor.
        ValueError, RuntimeError: as torch, for shapes, dtypes and reductions that do not fit.

    >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, -100]))
    tensor(0.1269)
    >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    >>> cross_entropy(logits, target, sample_weight=torch.tensor([1.0, 0.5]))
    tensor(0.7936)
    >>> cross_entropy(logits, target, ignore_index=torch.tensor([False, True]))
    tensor(0.1269)
    """
    if has_torch_function_variadic(input, target, weight, sample_weight) and _route.overrides_apply():
        return _route.overridden(
            cross_entropy, (input, target, weight, sample_weight), input, target, weight=weight,
            size_average=size_average, ignore_index=ignore_index, reduce=reduce, reduction=reduction,
            label_smoothing=label_smoothing, sample_weight=sample_weight, z_loss=z_loss, softcap=softcap,
            out_dtype=out_dtype, all_ignored=all_ignored, return_lse=return_lse, grad_in_forward=grad_in_forward,
            inplace=inplace,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if is_dtensor(input):
        made = served(
            "cross_entropy", input, {"target": target, "weight": weight, "sample_weight": sample_weight},
            {
                "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
                "z_loss": z_loss, "softcap": softcap, "out_dtype": out_dtype, "all_ignored": all_ignored,
                "return_lse": return_lse,
            },
        )  # fmt: skip
        if made is not None:
            return made
    index: Any = ignore_index
    if type(index) is not int and not is_one(index):
        target, index, sample_weight = with_one_index("cross_entropy", input, target, index, sample_weight)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    loss = _soft_cross_entropy if soft else _cross_entropy
    # As in torch, a negative or NaN smoothing is 0; torch names what is no number.
    if isinstance(label_smoothing, NUMBERS) and not label_smoothing >= 0:
        label_smoothing = 0.0
    if not isinstance(z_loss, NUMBERS):
        z_loss = checked("cross_entropy", "z_loss", z_loss)
    if not (z_loss or softcap is not None or out_dtype is not None or all_ignored != "nan" or return_lse):
        if grad_in_forward is None and not inplace and sample_weight is None:
            return loss(input, target, weight, reduction, index, label_smoothing, 0.0, 0.0)
        return loss(
            input, target, weight, reduction, index, label_smoothing, 0.0, 0.0,
            grad_in_forward=grad_in_forward, inplace=inplace, sample_weight=sample_weight,
        )  # fmt: skip

    dtype = input.dtype if out_dtype is None else out_dtype
    cap = checked_options("cross_entropy", z_loss, softcap, all_ignored, dtype)
    # A result wider than the kernels' arithmetic needs wider logits; a narrower one is rounded at the end.
    computed = torch.promote_types(input.dtype, dtype)
    wide = computed != input.dtype and computed == torch.float32
    if computed != input.dtype and not wide:
        input = input.to(computed)
        weight = weight if weight is None else weight.to(computed)
    result = loss(
        input, target, weight, reduction, index, label_smoothing, z_loss, cap,
        wide=wide, second=return_lse, zero=all_ignored == "zero", grad_in_forward=grad_in_forward, inplace=inplace,
        sample_weight=sample_weight,
    )  # fmt: skip
    if out_dtype is None:
        return result
    return tuple(each.to(out_dtype) for each in result) if return_lse else result.to(out_dtype)
