"""What stands in a place: our loss, and the original for what an original alone serves."""

import functools
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, compiler, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import _get_current_function_mode_stack, handle_torch_function
from torch.utils._device import DeviceContext

from .._derivatives import in_transform
from .._traced import is_exporting
from .._warnings import stand_ins
from ._calls import Tally, current

_modes = torch._C._len_torch_function_stack
_NO_OVERRIDE = torch._C._disabled_torch_function_impl
_PLAIN = {Tensor, nn.Parameter, nn.Buffer, type(None), bool, int, float, str}


def replacement(original: Callable[..., Any], ours: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    if original.__module__ == "torch.nn.functional":
        return _of_torch(original, ours, tally)
    return _of_another(original, ours, tally)


def _of_torch(original: Callable[..., Any], ours: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """What it asks before a call takes a tenth of the smallest loss."""

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        if is_dynamo_compiling() or compiler._is_compiling_flag:
            return (original if is_exporting() else ours)(*arguments, **options)
        if knows_originals(arguments) or (options and knows_originals(options.values())):
            # By itself the original would hand over what it finds under its name, which is this.
            return handle_torch_function(original, (*arguments, *options.values()), *arguments, **options)
        if is_transformed():
            return original(*arguments, **options)
        try:
            current.listens = True
            result = ours(*arguments, **options)
            why = current.why
            if why is None:
                tally.fused += 1
            else:
                tally.add_native(why)
        finally:
            current.listens = False
            current.why = None
        return result

    stand_ins.add(call.__code__)  # type: ignore[attr-defined]
    call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined]
    return call


def _of_another(original: Callable[..., Any], ours: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    serve = _serve

    def call(*arguments: Any, **options: Any) -> Any:
        return serve(original, ours, tally, arguments, options)

    # TorchScript compiles the original's source with the globals of what stands in its place.
    call = FunctionType(call.__code__, original.__globals__, closure=call.__closure__)
    return functools.update_wrapper(call, original)


def _serve(
    original: Callable[..., Any], ours: Callable[..., Any], tally: Tally, arguments: Any, options: dict[str, Any]
) -> Any:
    """The original answers what ours returns None for, or refuses."""
    if is_dynamo_compiling() or compiler._is_compiling_flag:
        result = None if is_exporting() else ours(*arguments, **options)
        return original(*arguments, **options) if result is None else result
    # No type overrides such a function: the original calls those of torch that one may override.
    if knows_originals(arguments) or knows_originals(options.values()) or is_transformed():
        return original(*arguments, **options)
    why: Callable[[], str] | None
    try:
        current.listens = True
        result = ours(*arguments, **options)
        why = current.why
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        refused = str(error)
        result, why = None, lambda: refused
    finally:
        current.listens = False
        current.why = None
    if why is not None:
        answer = original(*arguments, **options) if result is None else result
        tally.add_native(why)
        return answer
    if result is None:  # for a type or a mode, found within an argument
        return original(*arguments, **options)
    tally.fused += 1
    return result


def knows_originals(values: Iterable[Any] = ()) -> bool:
    """Whether a type or a mode overrides torch's functions, which it knows as they were."""
    for value in values:
        kind = type(value)
        if kind not in _PLAIN and getattr(kind, "__torch_function__", _NO_OVERRIDE) is not _NO_OVERRIDE:
            return True
    return _modes() > 0 and any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def is_transformed() -> bool:
    """Export and tracing would write our ops into programs that are to run without this package, and under a transform
    of torch.func ours are native. torch.compile, while it traces, looks like such a transform."""
    return is_exporting() or (not is_dynamo_compiling() and in_transform())
