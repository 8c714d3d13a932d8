"""What stands in a place: our loss, and the original for what an original alone serves."""

import functools
from collections.abc import Callable, Iterable
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
_PLAIN = {Tensor, nn.Parameter, nn.Buffer, type(None), bool, int, float, str}


def replacement(original: Callable[..., Any], ours: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
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
        current.listens = True
        try:
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


def knows_originals(values: Iterable[Any]) -> bool:
    """Whether a type or a mode overrides torch's functions, which it knows as they were."""
    for value in values:
        kind = type(value)
        if kind not in _PLAIN and hasattr(kind, "__torch_function__"):
            return True
    return _modes() > 0 and any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def is_transformed() -> bool:
    """Export and tracing would write our ops into programs that are to run without this package, and under a transform
    of torch.func ours are native."""
    return in_transform() or is_exporting()
