"""When a call takes the ops: everything else runs through its logits, by torch's matrix product and the fused loss."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear

from .. import _captures, _route
from .._derivatives import may_keep_gradients, transformed
from .._dtypes import HALVES, in_float, widened
from .._library import extension, why_native
from .._sizes import at_most
from .._traced import Described
from . import _by_classes, _kept, _ops, _passes
from ._call import ARGUMENTS, MEAN_OR_ZERO, TENSORS, Call
from ._chunks import PRODUCT_ELEMENTS, count
from ._rows import hits, rows_kept

# With fewer logits, or fewer numbers in the head, the chunks' bookkeeping costs more than it saves.
_FEW_LOGITS = 2**16
_SMALL_HEAD = 2**18


Results = tuple[Tensor, Tensor | None, Tensor | None]  # the loss, the second result, which rows are right


class Head(NamedTuple):
    """The matrix product before a loss, with its sizes flattened: see :class:`Call`."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C * K, D)
    linear_bias: Tensor | None
    logits_shape: tuple[int, ...]  # (N, C) or (N, C, K)
    logit_scale: Any

    def logits(self) -> Tensor:
        made = linear(self.input, self.linear_weight, self.linear_bias)
        if not (isinstance(self.logit_scale, float | int) and self.logit_scale == 1):
            made = made * self.logit_scale
        return made.reshape(self.logits_shape)

    def cast(self, convert: Callable[[Tensor], Tensor]) -> "Head":
        bias = self.linear_bias
        return self._replace(
            input=convert(self.input),
            linear_weight=convert(self.linear_weight),
            linear_bias=bias if bias is None else convert(bias),
        )


class Options(NamedTuple):
    """Of :func:`fusedloss._route.softmax`, and what the linear form has beside them."""

    sample_weight: Tensor | None = None
    wide: bool = False
    second: bool = False
    zero: bool = False
    correct: bool = False
    normalizer: Any = None
    chunk_rows: int | None = None
    torchs_rows: int | None = None  # of torch's options: for calls that have chunks at all
    grad_in_forward: bool | None = None


def softmax(
    name: str, head: Head, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    params: Sequence[Any], options: Options,
) -> Results:  # fmt: skip
    """The loss, its second result, and which rows are right, the latter two where they are asked for."""
    head = under_autocast(head)
    why = _declines(name, head, target, weight, reduction, ignore_index, params, options)
    if why is not None:
        _route.tell_native(why)
        return _through_logits(name, head, target, weight, reduction, ignore_index, params, options)
    if options.chunk_rows is None and is_small(head):
        rounds = head.input.dtype in HALVES and head.input.device.type == "cpu"
        through = _through_float_logits if rounds else _through_logits
        return through(name, head, target, weight, reduction, ignore_index, params, options)
    zero = options.zero and reduction == "mean"
    wide = _captures.is_wide(extension.losses[name].traits, head.input, target, options.wide)  # type: ignore[union-attr]
    normalizer = options.normalizer
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = torch.full((), normalizer, dtype=torch.float64, device=head.input.device)
    call = Call(
        head.input, head.linear_weight, head.linear_bias, target, weight, options.sample_weight, normalizer, name,
        MEAN_OR_ZERO if zero else _captures.REDUCTIONS[reduction], ignore_index, [float(each) for each in params],
        float(head.logit_scale), options.chunk_rows or options.torchs_rows or 0, wide, False,
    )  # fmt: skip
    needs = needs_gradients(call)
    if needs and call.linear_weight.requires_grad and _by_classes.pays(call):
        call = call._replace(by_classes=True)
    if not is_compiling():
        _route.tell(path(call))
    in_forward = makes_gradients(call, options)
    if in_forward and not call.by_classes:
        loss, right, *_ = torch.ops.fusedloss.linear_with_grad(*call, call.wanted, options.correct)
        return loss, None, right.detach() if options.correct else None
    grad_input = in_forward and call.input.requires_grad
    loss, second, right, *_ = torch.ops.fusedloss.linear(*call, options.second, options.correct, needs, grad_input)
    return loss, second if options.second else None, right.detach() if options.correct else None


def declines_head(head: Head, device: torch.device) -> str | None:
    """Why the chunks do not own an input and a head that is to be on a device, or None where they do."""
    for tensor in head[:3]:
        if why := _captures.unfit(tensor):
            return why
    return transformed([each for each in head[:3] if each is not None]) or unlike(head, device)


def unlike(head: Head, device: torch.device) -> str | None:
    if any(each is not None and each.dtype != head.input.dtype for each in head[1:3]):
        return "an input and a head of different dtypes"
    if any(each is not None and each.device != device for each in head[:3]):
        return _captures.DIFFERENT_DEVICES
    return None


def is_small(head: Head) -> bool:
    (rows, features), columns = head.input.shape, head.linear_weight.shape[0]
    return at_most(rows * columns, _FEW_LOGITS) and at_most(columns * features, _SMALL_HEAD)


def needs_gradients(call: Any) -> bool:
    return torch.is_grad_enabled() and any(call.wanted)


def makes_gradients(call: Any, options: Options) -> bool:
    """Whether forward makes the gradients: where one factor is all that backward has to add.

    Not in float16, whose gradients need the upstream gradient of a GradScaler before they are rounded.
    """
    if options.second or options.grad_in_forward is False or call.reduction == _captures.REDUCTIONS["none"]:
        return False
    if call.input.dtype == torch.float16 or not needs_gradients(call):
        return False
    return may_keep_gradients()


def under_autocast(head: Head) -> Head:
    """The operands in the dtype of autocast, as torch's matrix product takes them."""
    device = head.input.device.type
    if device not in _captures.DEVICES or not torch.is_autocast_enabled(device):
        return head
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return head.cast(cast)


def _declines(
    name: str, head: Head, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    params: Sequence[Any], options: Options,
) -> str | None:  # fmt: skip
    """Why the ops do not own a call, or None where they do."""
    if extension is None:
        return why_native
    for tensor in (*head[:3], options.normalizer):
        if isinstance(tensor, Tensor) and (why := _captures.unfit(tensor)):
            return why
    given = [*head[:3], target, weight, options.sample_weight, options.normalizer]
    if why := transformed([each for each in given if isinstance(each, Tensor)]):
        return why
    if why := unlike(head, head.input.device):
        return why
    if isinstance(head.logit_scale, Tensor):
        return "a logit_scale that is a tensor"
    if isinstance(options.normalizer, Tensor) and options.normalizer.requires_grad:
        return "a normalizer that requires a gradient"
    logits = Described(
        "Tensor", head.input.dtype, head.input.device, torch.strided, torch.Size(head.logits_shape), False
    )
    return _captures.softmax(
        extension.losses[name].traits, logits, target, weight, reduction, ignore_index, params, options.wide,  # type: ignore[arg-type]
        options.second, options.sample_weight,
    )  # fmt: skip


def path(call: Call, of_class: int = 0) -> str:
    """In words, for ``explain``: the chunks, and what a call takes beside its gradients and some numbers a row.

    ``of_class``: the bytes beside each logit.
    """
    rows, columns = call.input.shape[0], call.linear_weight.shape[0]
    of_head = needs_gradients(call) and call.linear_weight.requires_grad
    chunk_rows = min(rows, call.rows_of_chunk(of_head and not call.by_classes))
    chunks = count(rows, chunk_rows)
    extra = chunk_rows * columns * (call.input.dtype.itemsize + of_class)
    device = call.input.device.type
    if call.input.dtype in HALVES and of_head:
        in_float = call.linear_weight.numel()
        if call.by_classes or chunks == 1:  # on CUDA a product is scaled in float32 before it is rounded
            in_float = min(in_float, PRODUCT_ELEMENTS) if device == "cuda" else 0
        extra += in_float * call.arithmetic.itemsize
    where = f"cpu {extension.cpu_isa()}" if device == "cpu" else device  # type: ignore[union-attr]
    plural = "s" if chunks > 1 else ""
    return f"fused: {where}, {chunks} chunk{plural} of {chunk_rows} rows, {extra / 2**20:.1f} MiB beside the gradients"


def _through_logits(
    name: str, head: Head, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    params: Sequence[Any], options: Options,
) -> Results:  # fmt: skip
    """By torch's matrix product and the fused loss. It has every derivative, and torch's errors."""
    logits = head.logits()
    divided = options.normalizer is not None
    given: dict[str, Any] = {"wide": options.wide or divided, "second": options.second, "zero": options.zero}
    if options.sample_weight is not None:
        given["sample_weight"] = options.sample_weight
    results = _route.LOSSES[name].routed(
        logits, target, weight, "sum" if divided else reduction, ignore_index, *params, **given
    )
    loss, second = results if options.second else (results, None)
    if divided:
        loss = (loss / options.normalizer).to(_result_dtype(logits, target, options))
    right = None
    if options.correct:
        right = hits(logits.detach(), target)
        if (kept := rows_kept(target, ignore_index, options.sample_weight)) is not None:
            right = right & kept
        right = right.to(torch.float32 if logits.dtype in HALVES else logits.dtype)
    return loss, second, right


def _through_float_logits(
    name: str, head: Head, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    params: Sequence[Any], options: Options,
) -> Results:  # fmt: skip
    """Of half-precision inputs, rounding only the results and the gradients."""
    dtype = _result_dtype(head.input, target, options)
    loss, second, right = _through_logits(
        name, head.cast(in_float), in_float(target), weight if weight is None else weight.float(), reduction,
        ignore_index, params, options,
    )  # fmt: skip
    return loss.to(dtype), second if second is None else second.to(dtype), right


def _result_dtype(input: Tensor, target: Tensor, options: Options) -> torch.dtype:
    if input.dtype in HALVES and widened(input, options.wide):
        return torch.float32
    return torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype


def _formula(call: Call, second: bool, correct: bool) -> Callable[..., Results]:
    """A call's results as a function of its input and head: for derivatives of backward, and for decompositions."""
    zero = call.reduction == MEAN_OR_ZERO
    reduction = "mean" if zero else _NAMES[call.reduction]
    options = Options(call.sample_weight, call.wide, second, zero, correct, call.normalizer)

    def results(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Results:
        head = Head(input, linear_weight, linear_bias, call.logits_shape(input.shape[0]), call.logit_scale)
        return _through_logits(
            call.loss, head, call.target, call.weight, reduction, call.ignore_index, call.params, options
        )

    return results


_NAMES = {number: name for name, number in _captures.REDUCTIONS.items()}

if extension is not None:
    _ops.register(
        _ops.Family(
            "linear", Call, TENSORS, ARGUMENTS, _kept.size, _passes.forward, _passes.forward_with_gradients,
            _passes.backward, _formula,
        )
    )  # fmt: skip
