"""What a captured graph holds as a fused op: the rule of ``declines`` in csrc/torch, stated once more.

While torch.compile or torch.export captures a graph there are no tensors to hand to the extension, so the statement in
C++ cannot be asked. This one has its order and its words, and works on what the compiler knows: dtypes, devices, and
sizes that it may keep open. tests/compiled/test_captures.py holds the two against each other over a grid of calls.
Both functions return why the kernels do not own a call, or None where they do. Of the calls that they own,
``left_to_compiler`` says which torch.compile is handed in PyTorch's operators all the same.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._dtypes import HALVES
from ._library import extension
from ._sizes import at_most, broadcasts_to, broadcasts_with, exceeds, is_empty, is_open, rows_of, same_shape, same_size
from ._traced import Described

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as in torch.nn._reduction

DTYPES = (torch.float32, torch.float64, *HALVES)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PLAIN = ("Tensor", "Parameter", "FakeTensor", "FunctionalTensor")
# What was built, not what runs on this GPU: asking that would break the graph, and the op itself says so.
DEVICES: dict[str, Any] = {} if extension is None else extension.devices

DIFFERENT_DEVICES = "tensors on different devices"
DIFFERENT_DTYPES = "inputs of different dtypes"
FOR_CPU_ALONE = "a loss that was compiled for the CPU alone"

# An op costs a compiled step some microseconds more than a loop of Inductor's. From about this many elements on, the
# kernels have made up for them.
FEW_ELEMENTS = 2**14
_OURS = ("ignore_index", "sample_weight", "wide", "second", "zero")  # options of routed losses that torch.nn has not


def left_to_compiler(when: str, input: Any, rest: Sequence[Any], options: dict[str, Any]) -> str | None:
    """Why torch.compile is handed PyTorch's own operators for a call on a CPU, although the kernels own it; or None.

    ``when`` is of the loss: ``"always"``, of a formula without exponential, logarithm and root. Inductor computes that
    in one loop with what makes the input and with what takes the gradient; an op has to write and read both. ``"few"``,
    where torch.nn has the loss, unless ``rest`` or ``options`` have what it has not: of the numbers it knows two at
    most, an ``ignore_index`` and a smoothing. ``""``, of all others. A size that the compiler keeps open is not few.
    """
    if not when or input.device.type != "cpu":
        return None
    if when == "always":
        return "a formula that torch.compile fuses into its neighbours"
    ours = any(rest[2:]) or any(options.get(name) is not None and options[name] is not False for name in _OURS)
    if not ours and at_most(input.numel(), FEW_ELEMENTS):
        return "too few elements for an op to pay under torch.compile"
    return None


def pointwise(
    traits: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, params: Sequence[Any],
    third: Tensor | None = None, ignore_index: int | None = None,
) -> str | None:  # fmt: skip
    if why := _call((input, target, weight), reduction, params) or unfit(third):
        return why
    if ignore_index is not None and (why := _integer(ignore_index)):
        return why
    takes_integers = ignore_index is not None or traits.takes_integers
    if target.device != input.device:
        return DIFFERENT_DEVICES
    if input.dtype not in DTYPES or not (target.dtype in DTYPES or (takes_integers and target.dtype in _INTEGERS)):
        return "an input or target that is no float64, float32, bfloat16 or float16"
    if is_empty(input) or is_empty(target):
        return "an empty input"
    if input.device.type != "cpu" and not traits.on_cuda:
        return FOR_CPU_ALONE
    if not _in_range(params, traits.params):
        return "a parameter that is out of range"
    if third is not None and not (traits.has_positive_weight or traits.has_third_slope):
        return "a third operand, which the loss does not take"
    if ignore_index is not None:
        if why := _class_indices(traits, input, target, weight, third):
            return why
        sizes = input.shape
    else:
        if target.requires_grad and not (traits.of_difference or traits.has_target_slope):
            return "a target that requires a gradient"
        sizes = input.shape
        if not same_shape(input.shape, target.shape):
            if not (traits.broadcasts and broadcasts_with(input.shape, target.shape)):
                return "an input and a target whose shapes do not fit"
            sizes = torch.broadcast_shapes(input.shape, target.shape)
    if traits.has_third_slope and third is not None and not same_shape(third.shape, sizes):
        if not broadcasts_with(sizes, third.shape):
            return "a third operand whose shape does not fit"
        if is_empty(third):
            return "an empty input"
        sizes = torch.broadcast_shapes(sizes, third.shape)
    for factor in (weight, third):
        if factor is None:
            continue
        if factor.device != input.device:
            return DIFFERENT_DEVICES
        if factor.requires_grad and not (factor is third and traits.has_third_slope):
            return "a weight that requires a gradient"
        if factor.dtype not in DTYPES:
            return "a weight that is no float64, float32, bfloat16 or float16"
        if not broadcasts_to(factor.shape, sizes):
            return "a weight that does not fit the input"
    if ignore_index is not None:
        return None
    dtype = result_dtype(traits, input, target, weight, third)
    return dtype if isinstance(dtype, str) else None


def result_dtype(
    traits: Any, input: Tensor, target: Tensor, weight: Tensor | None, third: Tensor | None = None
) -> torch.dtype | str:  # fmt: skip
    """The dtype of torch's result, which is that of the input or float32 beside a half-precision one; or why not."""
    half, result = input.dtype in HALVES, input.dtype
    of_weight = result if weight is None else weight.dtype
    of_third = third.dtype if third is not None and traits.has_third_slope else result
    some_dims = any(each.dim() for each in (input, target, *([] if third is None else [third])))
    if weight is not None and traits.result == "promoted" and not weight.dim() and some_dims:
        of_weight = result  # a weight without dimensions gives way to losses that have some
    if half and torch.is_autocast_enabled(input.device.type):
        if traits.of_variances:
            return "autocast, which widens some of torch's steps, on some devices"
        if torch.float64 in (target.dtype, of_third, result if traits.result == "of target" else of_weight):
            return DIFFERENT_DTYPES
        if traits.of_probabilities and DEVICES[input.device.type].autocast_refuses_probabilities:
            return "probabilities under autocast, which torch refuses"
        return torch.float32
    if traits.result == "promoted":
        broadcasts_first = traits.of_difference and not traits.has_third_slope
        gives_way = not broadcasts_first and (not input.dim()) != (not target.dim())
        if gives_way and input.dtype != target.dtype and target.dtype.is_floating_point:
            return DIFFERENT_DTYPES
        if third is not None and of_third != result and bool(third.dim()) != bool(input.dim() or target.dim()):
            return DIFFERENT_DTYPES
        for other in (target.dtype, of_weight, of_third):
            if other != result:  # torch.export would write the call into the graph
                result = torch.promote_types(result, other)
    elif traits.result == "of target":
        result = target.dtype
    elif traits.result == "same" and not (target.dtype == result == of_weight):
        return DIFFERENT_DTYPES
    return result if result == input.dtype or (half and result == torch.float32) else DIFFERENT_DTYPES


def _class_indices(
    traits: Any, input: Tensor, target: Tensor, weight: Tensor | None, third: Tensor | None
) -> str | None:
    device = DEVICES[input.device.type]
    if not traits.takes_class_indices:
        return "class indices, which the loss does not take"
    if target.dtype != torch.int64:
        return "class indices that are not int64"
    if input.dim() < 2 or not same_shape(target.shape, rows_of(input)):
        return "class indices that do not fit the input"
    if exceeds(input.shape[1], device.most_classes):
        return "more classes than a kernel counts"
    if third is not None and not device.takes_third_with_class_indices:
        return "class indices beside a pos_weight"
    if torch.is_autocast_enabled(input.device.type):
        return "autocast"
    if any(factor is not None and factor.dtype != input.dtype for factor in (weight, third)):
        return "a weight of another dtype than the input"
    return None


def softmax(
    traits: Any, logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int,
    params: Sequence[Any], wide: bool, second: bool, sample_weight: Tensor | None = None,
) -> str | None:  # fmt: skip
    if why := _call((logits, target, weight), reduction, params) or _integer(ignore_index) or unfit(sample_weight):
        return why
    if target.device != logits.device:
        return DIFFERENT_DEVICES
    if logits.dtype not in DTYPES:
        return "the logits are no float64, float32, bfloat16 or float16"
    if logits.dim() < 1 or is_empty(logits):
        return "the logits are empty or a single number"
    if logits.device.type != "cpu" and not traits.on_cuda:
        return FOR_CPU_ALONE
    if second and not traits.reads_row:
        return "no second result of a loss of the target's logit alone"
    classes = logits.shape[min(logits.dim() - 1, 1)]
    if exceeds(classes, DEVICES[logits.device.type].most_classes):
        return "more classes than a kernel counts"
    if not _in_range(params, traits.params):
        return "a parameter is out of range"
    if traits.soft:
        if not same_shape(target.shape, logits.shape):
            return "the probabilities are not of the logits' shape"
        if target.dtype not in same_or_wider(logits):
            return "the probabilities are of another dtype"
        if target.requires_grad:
            return "the probabilities require a gradient"
        if ignore_index >= 0:
            return "an ignore_index beside probabilities"
    else:
        if target.dtype not in (torch.int64, torch.uint8):
            return "the target holds no class indices in int64 or uint8"
        if not same_shape(target.shape, rows_of(logits)):
            return "the target does not fit the logits"
    if sample_weight is not None and (why := _sample_weight(logits, sample_weight)):
        return why
    if weight is None:
        return None
    if weight.device != logits.device:
        return DIFFERENT_DEVICES
    if weight.requires_grad:
        return "the weight requires a gradient"
    if weight.dtype != logits.dtype and not (
        is_wide(traits, logits, target, wide) and weight.dtype in same_or_wider(logits)
    ):
        return "the weight is of another dtype than the logits"
    if weight.dim() != 1 or not same_size(weight.shape[0], classes):
        return "the weight does not fit the classes"
    return None


def _sample_weight(logits: Tensor, sample_weight: Tensor) -> str | None:
    if sample_weight.device != logits.device:
        return DIFFERENT_DEVICES
    if sample_weight.requires_grad:
        return "the sample_weight requires a gradient"
    if sample_weight.dtype not in DTYPES:
        return "the sample_weight is no float64, float32, bfloat16 or float16"
    if not same_shape(sample_weight.shape, rows_of(logits)):
        return "the sample_weight does not fit the rows"
    return None


def row_sums(
    traits: Any, first: Tensor, second: Tensor | None, third: Tensor | None, target: Tensor | None,
    weight: Tensor | None, reduction: str, params: Sequence[Any],
) -> str | None:  # fmt: skip
    others = (second, third)
    if why := _call((first, None, second, third, target, weight), reduction, params):
        return why
    for k, other in enumerate(others):
        if (other is not None) != (k + 1 < traits.operands):
            return "more or fewer operands than the loss takes"
        if other is not None and other.device != first.device:
            return DIFFERENT_DEVICES
    if first.dtype not in DTYPES:
        return "an input that is no float64, float32, bfloat16 or float16"
    if first.dim() == 0 or is_empty(first):
        return "an input that is empty or a single number"
    for other in others:
        if other is not None and other.dtype != first.dtype:
            return "inputs of different dtypes"
        if other is not None and not same_shape(other.shape, first.shape):
            return "inputs of different shapes"
    device = DEVICES[first.device.type]
    if exceeds(first.shape[-1], device.most_classes):
        return "more columns than a kernel counts"
    if not _in_range(params, traits.params):
        return "a parameter that is out of range"
    if traits.whole >= 0 and params[traits.whole] not in (1, 2):
        return "a norm for which there is no kernel"
    if why := _target_of_rows(traits, first, target):
        return why
    wide = widens(first)
    if traits.takes_class and first.dtype in HALVES and not wide and not device.margins_of_halves:
        return "half precision, which torch refuses on a CPU"
    return _weight_of_rows(traits, first, weight, wide)


def _target_of_rows(traits: Any, first: Tensor, target: Tensor | None) -> str | None:
    if not traits.takes_labels and not traits.takes_class:
        return None if target is None else "a target, which the loss does not take"
    if target is None:
        return "no target"
    if target.device != first.device:
        return DIFFERENT_DEVICES
    rows = first.shape[:-1]
    if traits.takes_class:
        if target.dtype != torch.int64:
            return "class indices that are not int64"
        one = len(rows) == 0 or (target.dim() == 0 and same_size(rows[0], 1))
        fits = target.dim() == 0 or same_size(target.shape[0], 1) if one else same_shape(target.shape, rows)
        return None if len(rows) <= 1 and target.dim() <= 1 and fits else "class indices that do not fit the input"
    if target.dtype not in (*DTYPES, torch.int64, torch.int32, torch.int16, torch.int8):
        return "labels in a dtype that the kernels do not read"
    if len(rows) > 1 or not same_shape(target.shape, rows):
        return "labels that do not fit the input"
    return None


def _weight_of_rows(traits: Any, first: Tensor, weight: Tensor | None, wide: bool) -> str | None:
    if weight is None:
        return None
    if not traits.takes_class:
        return "a weight, which the loss does not take"
    if weight.device != first.device:
        return DIFFERENT_DEVICES
    if weight.requires_grad:
        return "a weight that requires a gradient"
    if weight.dtype != first.dtype and not (wide and weight.dtype == torch.float32):
        return "a weight of another dtype than the input"
    if weight.dim() != 1 or not same_size(weight.shape[0], first.shape[-1]):
        return "a weight that does not fit the classes"
    return None


def widens(tensor: Tensor) -> bool:
    """Whether autocast makes results float32."""
    return tensor.dtype in HALVES and torch.is_autocast_enabled(tensor.device.type)


def is_wide(traits: Any, logits: Tensor, target: Tensor, wide: bool) -> bool:
    """Whether results are float32 of half-precision logits: asked for, under autocast, beside wider probabilities."""
    if wide or (traits.soft and target.dtype != logits.dtype):
        return True
    return logits.dtype in HALVES and torch.is_autocast_enabled(logits.device.type)


def _call(tensors: Sequence[Tensor | None], reduction: Any, params: Sequence[Any]) -> str | None:
    """What the reading of the arguments refuses, in csrc/torch/python_call.h."""
    for tensor in tensors[:2]:
        if why := unfit(tensor):
            return why
    # As the compiler answers it while it traces; the op itself sees to dual tensors of forward-mode AD.
    if isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter):
        return "a transform of torch.func, or tracing"
    for tensor in tensors[2:]:
        if why := unfit(tensor):
            return why
    if reduction not in REDUCTIONS:
        return "an unusual reduction"
    if extension is not None and len(params) > extension.most_params:
        return "more parameters than the kernels take"
    if not all(isinstance(value, int | float | torch.SymInt | torch.SymFloat) for value in params):
        return "a parameter that is no number"
    if any(isinstance(value, int) and abs(value) > sys.float_info.max for value in params):
        return "a parameter beyond float64"
    return None


def _integer(ignore_index: Any) -> str | None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        return "an ignore_index that is no integer"
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        return "an ignore_index beyond 64 bits"
    if is_open(ignore_index):  # the op would pin it down, and each value get a graph of its own
        return "an ignore_index that changes from call to call"
    return None


def unfit(tensor: Any) -> str | None:
    """Why no kernel takes a tensor."""
    if tensor is None:
        return None
    if (tensor.type_name if isinstance(tensor, Described) else type(tensor).__name__) not in _PLAIN:
        return "a subclass of torch.Tensor, or no tensor"
    if tensor.device.type not in DEVICES or tensor.layout != torch.strided:
        return "a device, layout or view without kernels"
    return None


def _in_range(params: Sequence[Any], ranges: Sequence[tuple[float, float, bool]]) -> bool:
    """Parameters that are not given are 0."""
    given = (*params, *[0.0] * len(ranges))
    return all(
        (value > least if above_least else value >= least) and value <= most
        for value, (least, most, above_least) in zip(given, ranges, strict=False)
    )


def same_or_wider(logits: Tensor) -> tuple[torch.dtype, ...]:
    return (logits.dtype, torch.float32) if logits.dtype in HALVES else (logits.dtype,)
