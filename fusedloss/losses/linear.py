"""The softmax losses from hidden states and a head, without ever holding the logits."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import _route
from .._dtypes import HALVES
from ..linear import Options
from ._dtensors import is_dtensor
from ._ignored import IgnoreIndex
from ._linear import (
    Given,
    check_head,
    checked_divisor,
    checked_rows,
    checked_scale,
    in_dtype,
    results,
    shifted,
    with_index,
)
from ._numbers import NUMBERS, checked
from .cross_entropy import checked_options, cross_entropy
from .focal import checked_alpha, focal_loss
from .log_probs import log_probs

__all__ = ["linear_cross_entropy", "linear_focal_loss", "linear_log_probs"]


# fmt: off
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: IgnoreIndex | None = ...,
    label_smoothing: float = ..., options: Any = ..., z_loss: float = ..., softcap: float | None = ...,
    logit_scale: float | Tensor = ..., shift: int = ..., normalizer: float | Tensor | None = ...,
    sample_weight: Tensor | None = ..., out_dtype: torch.dtype | None = ..., all_ignored: str = ...,
    return_lse: Literal[False] = ..., return_accuracy: Literal[False] = ...,
    chunk_rows: int | None = ..., grad_in_forward: bool | None = ...,
) -> Tensor: ...

@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ...,
    weight: Tensor | None = ..., reduction: str = ..., ignore_index: IgnoreIndex | None = ...,
    label_smoothing: float = ..., options: Any = ..., z_loss: float = ..., softcap: float | None = ...,
    logit_scale: float | Tensor = ..., shift: int = ..., normalizer: float | Tensor | None = ...,
    sample_weight: Tensor | None = ..., out_dtype: torch.dtype | None = ..., all_ignored: str = ...,
    return_lse: bool = ..., return_accuracy: bool = ...,
    chunk_rows: int | None = ..., grad_in_forward: bool | None = ...,
) -> Tensor | tuple[Tensor, ...]: ...
# fmt: on


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: IgnoreIndex | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    shift: int = 0,
    normalizer: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    all_ignored: str = "nan",
    return_lse: bool = False,
    return_accuracy: bool = False,
    chunk_rows: int | None = None,
    grad_in_forward: bool | None = None,
) -> Any:
    r"""Cross-entropy of a linear layer's outputs, as :func:`torch.nn.functional.linear_cross_entropy`.

    The loss is :func:`cross_entropy` of

    .. math:: x = \mathrm{scale} \cdot (h W^\top + b)

    whose N x C numbers are never in memory at once: they are made in chunks of rows, and so is their gradient, in the
    same memory. A training step takes the three matrix products of the layer, its gradients, and one chunk.

    Args:
        input: hidden states h, (D) or (..., D), of any number of leading dimensions.
        linear_weight: the head W, (C, D), or (C, d1, ..., dK, D) for K-dimensional losses. A DTensor that is sharded
            over its classes, beside DTensors, takes :func:`fusedloss.parallel.linear_cross_entropy`.
        target: class indices of the leading dimensions, followed by (d1, ..., dK), in int64 or uint8; or class
            probabilities (..., C, d1, ..., dK).
        linear_bias: b, (C) or (C, d1, ..., dK).
        weight, reduction, label_smoothing, z_loss, softcap, sample_weight, out_dtype, all_ignored, return_lse: as for
            :func:`cross_entropy`.
        ignore_index: as for :func:`cross_entropy`; None is -100.
        options: torch's ``LinearCrossEntropyOptions``, of which ``batch_chunk_size`` is taken for ``chunk_rows``.
        logit_scale: multiplies the logits; a tensor runs through the logits.
        shift: row t of the last leading dimension gets the target of row t + shift, 1 for the next token. The results
            of rows are then shorter by ``shift``. The hidden states are not copied beside class indices.
        normalizer: a mean divides by this number or tensor of one number, such as the tokens of all micro-batches.
        return_accuracy: returns also the share of the rows that count whose largest logit is the target's, or without a
            reduction 1 and 0 for each row.
        chunk_rows: rows of a chunk. None: in float32 on a CPU 512 or an eighth of all, as far as their logits fit into
            67 MB; in half precision and on CUDA as many as fit into 134 MB.
        grad_in_forward: None makes the gradients while the logits are there, False makes the logits again in backward,
            which is done in float16, under saved-tensor hooks, with ``return_lse`` and without a reduction too.

    Returns:
        The loss, or a tuple of the loss, the lse and the accuracy, the latter two where they are asked for.

    Raises:
        RuntimeError: as torch, for shapes that do not fit; or the head is a DTensor of other placements.
        IndexError: a target is out of range and not ``ignore_index``, before anything is computed; on a GPU as for
            :func:`cross_entropy`.
        ValueError: ``chunk_rows`` is below 1, ``shift`` is negative or as long as the sequences, or ``normalizer`` is
            given without a mean.
        ValueError, TypeError: as :func:`cross_entropy`.

    >>> hidden, head = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> linear_cross_entropy(hidden, head, torch.tensor([0, 1]))
    tensor(0.1269)
    >>> linear_cross_entropy(hidden, head, torch.tensor([0, 1]), shift=1, return_accuracy=True)
    (tensor(2.1269), tensor(0.))
    """
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight)
    if has_torch_function_variadic(*tensors) and _route.overrides_apply():
        return _route.overridden(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, options=options,
            z_loss=z_loss, softcap=softcap, logit_scale=logit_scale, shift=shift, normalizer=normalizer,
            sample_weight=sample_weight, out_dtype=out_dtype, all_ignored=all_ignored, return_lse=return_lse,
            return_accuracy=return_accuracy, chunk_rows=chunk_rows, grad_in_forward=grad_in_forward,
        )  # fmt: skip
    given = Given(input, linear_weight, linear_bias, target, ignore_index, sample_weight)
    if is_dtensor(linear_weight):
        return _of_dtensors(
            given, weight, chunk_rows if options is None or chunk_rows is not None else options.batch_chunk_size,
            return_accuracy,
            {
                "reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing,
                "z_loss": z_loss, "softcap": softcap, "logit_scale": logit_scale, "shift": shift,
                "normalizer": normalizer, "out_dtype": out_dtype, "all_ignored": all_ignored, "return_lse": return_lse,
                "grad_in_forward": grad_in_forward,
            },
        )  # fmt: skip
    check_head("linear_cross_entropy", given)
    is_mask = isinstance(ignore_index, Tensor) and ignore_index.dtype == torch.bool
    if ignore_index is not None and not is_mask and target.shape == given.logits:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    given = with_index(
        "linear_cross_entropy", given._replace(ignore_index=-100 if ignore_index is None else ignore_index)
    )
    given = shifted(given, shift)
    if isinstance(label_smoothing, NUMBERS) and not label_smoothing >= 0:
        label_smoothing = 0.0
    if not isinstance(z_loss, NUMBERS):
        z_loss = checked("linear_cross_entropy", "z_loss", z_loss)
    cap = checked_options("linear_cross_entropy", z_loss, softcap, all_ignored, out_dtype)
    given, weight, wide = in_dtype(given, weight, out_dtype)
    loss, lse, accuracy = results(
        "soft_cross_entropy" if given.soft else "cross_entropy", given, weight, reduction,
        (label_smoothing, z_loss, cap),
        Options(
            None, wide, return_lse, all_ignored == "zero", return_accuracy,
            checked_divisor("linear_cross_entropy", normalizer, reduction), checked_rows(chunk_rows),
            None if options is None else options.batch_chunk_size, grad_in_forward,
        ),
        checked_scale("linear_cross_entropy", logit_scale), shift,
        lambda logits: cross_entropy(
            logits, given.target, weight, ignore_index=given.ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        ),
    )  # fmt: skip
    wanted = [loss, *([lse] if return_lse else [])]
    if out_dtype is not None:
        wanted = [each.to(out_dtype) for each in wanted]
    if return_accuracy:
        wanted.append(accuracy)
    return tuple(wanted) if len(wanted) > 1 else loss if out_dtype is None else wanted[0]


def _of_dtensors(
    given: Given, weight: Tensor | None, chunk_rows: int | None, return_accuracy: bool, options: dict[str, Any]
) -> Any:
    from ..parallel import _placed_linear

    if return_accuracy:
        raise RuntimeError(
            "linear_cross_entropy: expected linear_weight to be whole on every rank for return_accuracy, got a DTensor "
            f"of placements {given.linear_weight.placements}; pass linear_weight.full_tensor()"  # type: ignore[attr-defined]
        )
    operands = {
        "input": given.input, "linear_weight": given.linear_weight, "linear_bias": given.linear_bias,
        "target": given.target, "weight": weight, "sample_weight": given.sample_weight,
    }  # fmt: skip
    return _placed_linear.served(operands, {**options, "chunk_rows": chunk_rows})


def linear_focal_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    alpha: float | Sequence[float] | Tensor | None = None,
    gamma: float = 2.0,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: IgnoreIndex = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    shift: int = 0,
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
    grad_in_forward: bool | None = None,
) -> Tensor:
    r"""Softmax focal loss of a linear layer's outputs: :func:`focal_loss` in the form of :func:`linear_cross_entropy`.

    Args:
        input, linear_weight, linear_bias, logit_scale, shift, normalizer, chunk_rows, grad_in_forward: as for
            :func:`linear_cross_entropy`.
        target: class indices of the leading dimensions, followed by those of a K-dimensional head.
        alpha, gamma, ignore_index, reduction, sample_weight: as for :func:`focal_loss`.

    Raises:
        RuntimeError, IndexError, ValueError, TypeError: as :func:`linear_cross_entropy` and :func:`focal_loss`;
            ValueError for class probabilities too.

    >>> linear_focal_loss(torch.tensor([[1.0]]), torch.tensor([[2.0], [0.0]]), torch.tensor([0]))
    tensor(0.0018)
    """
    tensors = (input, linear_weight, target, alpha, linear_bias, sample_weight)
    if has_torch_function_variadic(*tensors) and _route.overrides_apply():
        return _route.overridden(
            linear_focal_loss, tensors, input, linear_weight, target, alpha=alpha, gamma=gamma, linear_bias=linear_bias,
            ignore_index=ignore_index, reduction=reduction, sample_weight=sample_weight, logit_scale=logit_scale,
            shift=shift, normalizer=normalizer, chunk_rows=chunk_rows, grad_in_forward=grad_in_forward,
        )  # fmt: skip
    given = Given(input, linear_weight, linear_bias, target, ignore_index, sample_weight)
    check_head("linear_focal_loss", given)
    factor, weight, gamma = checked_alpha("linear_focal_loss", alpha, gamma, reduction, input, linear_weight.shape[0])
    if given.soft:
        raise ValueError(f"expected class indices, got a target of {target.dtype}")
    given = shifted(with_index("linear_focal_loss", given), shift)
    return results(
        "focal", given, weight, reduction, (factor, gamma),
        Options(
            normalizer=checked_divisor("linear_focal_loss", normalizer, reduction),
            chunk_rows=checked_rows(chunk_rows), grad_in_forward=grad_in_forward,
        ),
        checked_scale("linear_focal_loss", logit_scale), shift,
        lambda logits: focal_loss(logits, given.target, alpha, gamma, reduction=reduction),
    )[0]  # fmt: skip


# fmt: off
@overload
def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ..., temperature: float = ...,
    ignore_index: int = ..., return_entropy: Literal[False] = ...,
    logit_scale: float | Tensor = ..., shift: int = ..., chunk_rows: int | None = ...,
) -> Tensor: ...

@overload
def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ..., temperature: float = ...,
    ignore_index: int = ..., return_entropy: Literal[True],
    logit_scale: float | Tensor = ..., shift: int = ..., chunk_rows: int | None = ...,
) -> tuple[Tensor, Tensor]: ...

@overload
def linear_log_probs(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = ..., temperature: float = ...,
    ignore_index: int = ..., return_entropy: bool,
    logit_scale: float | Tensor = ..., shift: int = ..., chunk_rows: int | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logit_scale: float | Tensor = 1.0,
    shift: int = 0,
    chunk_rows: int | None = None,
) -> Any:
    r"""Log-probabilities of tokens from hidden states: :func:`log_probs` in the form of :func:`linear_cross_entropy`.

    What reinforcement learning on language models asks for. Forward keeps two or three numbers a row, and backward
    makes the logits again.

    Args:
        input, linear_weight, linear_bias, logit_scale, shift, chunk_rows: as for :func:`linear_cross_entropy`.
        target: class indices of the leading dimensions, followed by those of a K-dimensional head.
        temperature, ignore_index, return_entropy: as for :func:`log_probs`; both results are differentiable.

    Returns:
        In the target's shape, shorter by ``shift``; in float32 for bfloat16 and float16.

    Raises:
        RuntimeError, IndexError, ValueError, TypeError: as :func:`linear_cross_entropy` and :func:`log_probs`.

    >>> hidden, head = torch.tensor([[1.0]]), torch.tensor([[2.0], [0.0]])
    >>> linear_log_probs(hidden, head, torch.tensor([0]), return_entropy=True)
    (tensor([-0.1269]), tensor([0.3653]))
    """
    tensors = (input, linear_weight, target, linear_bias)
    if has_torch_function_variadic(*tensors) and _route.overrides_apply():
        return _route.overridden(
            linear_log_probs, tensors, input, linear_weight, target, linear_bias=linear_bias, temperature=temperature,
            ignore_index=ignore_index, return_entropy=return_entropy, logit_scale=logit_scale, shift=shift,
            chunk_rows=chunk_rows,
        )  # fmt: skip
    if not isinstance(temperature, NUMBERS):
        temperature = checked("linear_log_probs", "temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    given = Given(input, linear_weight, linear_bias, target, ignore_index)
    check_head("linear_log_probs", given)
    given = shifted(given, shift)
    value, entropy, _ = results(
        "log_probs", given, None, "none", (temperature, float(return_entropy)),
        Options(wide=input.dtype in HALVES, second=return_entropy, chunk_rows=checked_rows(chunk_rows)),
        checked_scale("linear_log_probs", logit_scale), shift,
        lambda logits: log_probs(logits, given.target, ignore_index=ignore_index),
    )  # fmt: skip
    return (value, entropy) if return_entropy else value
