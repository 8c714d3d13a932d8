"""What the linear losses share: the shapes, the shift to the next token, and what a call returns."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linear
from .._sizes import same_shape
from ._dtensors import refuse_dtensor
from ._ignored import IgnoreIndex, is_one, with_one_index
from ._numbers import NUMBERS, checked
from ._rows import class_index


class Given(NamedTuple):
    """A call before its rows are flattened: leading dimensions, then the positions of a K-dimensional head."""

    input: Tensor  # (*leading, D)
    linear_weight: Tensor  # (C, *positions, D)
    linear_bias: Tensor | None  # (C, *positions)
    target: Any  # (*leading, *positions) of class indices, or (*leading, C, *positions) of probabilities
    ignore_index: Any = -100
    sample_weight: Any = None  # (*leading, *positions)

    @property
    def leading(self) -> torch.Size:
        return self.input.shape[:-1]

    @property
    def positions(self) -> torch.Size:
        return self.linear_weight.shape[1:-1]

    @property
    def rows(self) -> torch.Size:
        return self.leading + self.positions

    @property
    def logits(self) -> torch.Size:
        return self.leading + self.linear_weight.shape[:-1]

    @property
    def soft(self) -> bool:
        return isinstance(self.target, Tensor) and self.target.is_floating_point()


def check_head(function: str, given: Given) -> None:
    """Raises what torch's linear_cross_entropy raises, but takes inputs of more dimensions."""
    tensor: Any
    for name, tensor in zip(given._fields[:3], given[:3], strict=True):
        refuse_dtensor(function, name, tensor, "whole", "full_tensor")
    input, weight, bias = given[:3]
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality at least 1, got {input.dim()}")
    if weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {weight.dim()}")
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:-1]):
        raise RuntimeError(f"expected linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    if weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(weight.shape)} requires"
            f" batched input, (N, {input.shape[-1]}), got unbatched"
            f" input with shape {tuple(input.shape)}"
        )


def with_index(function: str, given: Given) -> Given:
    """One index for what is ignored."""
    index: IgnoreIndex = given.ignore_index
    if type(index) is int or is_one(index):
        return given
    target, index, sample_weight = with_one_index(function, given.rows, given.target, index, given.sample_weight)
    return given._replace(target=target, ignore_index=index, sample_weight=sample_weight)


def shifted(given: Given, shift: int) -> Given:
    """Row t gets the target of row t + shift, along the last leading dimension.

    The hidden states are not copied beside class indices: the last rows are ignored ones.
    """
    if not shift:
        return given
    if isinstance(shift, bool) or not isinstance(shift, int):
        raise TypeError(f"shift must be an int, not {type(shift).__name__}")
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    dim = len(given.leading) - 1
    if dim < 0:
        raise ValueError(f"a shift needs a sequence, got an input of shape {tuple(given.input.shape)}")
    length = given.leading[dim]
    if shift >= length:
        raise ValueError(f"shift must be below the length {length} of the sequences, got {shift}")
    weight = given.sample_weight
    if given.soft:
        return given._replace(
            input=given.input.narrow(dim, 0, length - shift),
            target=given.target.narrow(dim, shift, length - shift),
            sample_weight=None if weight is None else weight.narrow(dim, shift, length - shift),
        )
    return given._replace(
        target=_moved(class_index(given.target), dim, shift, given.ignore_index),
        sample_weight=None if weight is None else _moved(weight, dim, shift, 0),
    )


def _moved(of_rows: Tensor, dim: int, shift: int, filler: int) -> Tensor:
    end = torch.full_like(of_rows.narrow(dim, 0, shift), filler)
    return torch.cat([of_rows.narrow(dim, shift, of_rows.shape[dim] - shift), end], dim)


def checked_divisor(function: str, normalizer: Any, reduction: str) -> Any:
    """A number, or a tensor of one, that a mean divides by."""
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"normalizer needs reduction='mean', whose sum it divides, got {reduction!r}")
    return normalizer if isinstance(normalizer, NUMBERS) else checked(function, "normalizer", normalizer)


def checked_rows(chunk_rows: Any) -> Any:
    if chunk_rows is None:
        return None
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows must be an int, not {type(chunk_rows).__name__}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    return chunk_rows


def checked_scale(function: str, logit_scale: Any) -> Any:
    return logit_scale if isinstance(logit_scale, NUMBERS) else checked(function, "logit_scale", logit_scale)


def in_dtype(given: Given, weight: Tensor | None, out_dtype: torch.dtype | None) -> tuple[Given, Tensor | None, bool]:
    """As cross_entropy: a result wider than float32 needs wider logits."""
    if out_dtype is None:
        return given, weight, False
    computed = torch.promote_types(given.input.dtype, out_dtype)
    wide = computed != given.input.dtype and computed == torch.float32
    if computed == given.input.dtype or wide:
        return given, weight, wide
    bias = given.linear_bias
    given = given._replace(
        input=given.input.to(computed),
        linear_weight=given.linear_weight.to(computed),
        linear_bias=bias if bias is None else bias.to(computed),
    )
    return given, weight if weight is None else weight.to(computed), False


def results(
    name: str, given: Given, weight: Tensor | None, reduction: str, params: Sequence[Any], options: linear.Options,
    logit_scale: Any, shift: int, misfit: Callable[[Tensor], Any],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The loss, the second result, and the share of the rows that are right; without a reduction which rows are.

    ``misfit(logits)`` raises torch's error for a target that does not fit.
    """
    wanted = given.logits if given.soft else given.rows
    fits = isinstance(given.target, Tensor) and same_shape(given.target.shape, wanted)
    head, sample_weight = flat_head(given, logit_scale), flat_rows(given, given.sample_weight)
    if not fits:
        if given.input.dim() <= 2:
            misfit(head.logits().reshape(given.logits))
        elif not isinstance(given.target, Tensor) or given.target.dim() != len(wanted):
            # torch's words for every such input
            raise RuntimeError(f"expected input with dimensionality 1 or 2, got {given.input.dim()}")
        raise ValueError(
            f"expected a target of class indices of shape {tuple(given.rows)} or of probabilities of shape "
            f"{tuple(given.logits)}, got {tuple(given.target.shape)}"
        )
    target = _flat(given.target, head.logits_shape) if given.soft else flat_rows(given, given.target)
    index = given.ignore_index
    loss, second, right = linear.softmax(
        name, head, target, weight, reduction, index, params, options._replace(sample_weight=sample_weight)
    )
    if right is not None and reduction != "none":
        kept = linear.rows_kept(target, index, sample_weight)
        right = right.mean() if kept is None else right.sum() / kept.sum()
    shaped = in_shape_of_rows(given, shift)
    if reduction == "none":
        loss, right = shaped(loss), right if right is None else shaped(right)
    return loss, second if second is None else shaped(second), right


def flat_head(given: Given, logit_scale: Any) -> linear.Head:
    """The matrix product over flat rows and flat columns."""
    rows, positions = math.prod(given.leading), math.prod(given.positions)
    classes, bias = given.linear_weight.shape[0], given.linear_bias
    return linear.Head(
        given.input if given.input.dim() == 2 else given.input.reshape(rows, given.input.shape[-1]),
        given.linear_weight.flatten(0, -2) if given.positions else given.linear_weight,
        bias if bias is None else bias.flatten(),
        (rows, classes, positions) if given.positions else (rows, classes),
        logit_scale,
    )


def flat_rows(given: Given, of_rows: Any) -> Any:
    """What there is one of for each loss, over the flat rows of :func:`flat_head`; another shape as it is."""
    if not isinstance(of_rows, Tensor) or not same_shape(of_rows.shape, given.rows):
        return of_rows
    rows = math.prod(given.leading)
    return _flat(of_rows, (rows, math.prod(given.positions)) if given.positions else (rows,))


def _flat(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.dim() == len(shape) else tensor.reshape(shape)


def in_shape_of_rows(given: Given, shift: int) -> Callable[[Tensor], Tensor]:
    """In the shape of the rows, without those that a shift leaves no target."""

    def shaped(values: Tensor) -> Tensor:
        values = _flat(values, given.rows)
        if not shift or given.soft:
            return values
        dim = len(given.leading) - 1
        return values.narrow(dim, 0, given.leading[dim] - shift)

    return shaped
