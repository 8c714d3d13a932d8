"""Which derivatives are being made: what an op or a Function in Python, which has only a first one, does not take."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ._traced import is_exporting

_interpreter, _is_tracing = torch._C._functorch.peek_interpreter_stack, torch._C._is_tracing


def in_transform() -> bool:
    """Whether a transform of torch.func or tracing is on."""
    return _interpreter() is not None or _is_tracing()


def transformed(tensors: Sequence[Tensor]) -> str | None:
    """Why a call under a transform of torch.func, tracing or forward mode runs natively; None outside of them."""
    if is_compiling():
        return None
    if in_transform():
        return "a transform of torch.func, or tracing"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        return "forward-mode AD"
    return None


def needs_formula(*upstreams: Tensor | None) -> bool:
    """A graph of the backward is wanted, or it is over a batch of upstream gradients, of either of torch's vmaps."""
    if torch.is_grad_enabled():
        return True
    return any(each is not None and "Batched" in str(torch._C._dispatch_keys(each)) for each in upstreams)


def may_keep_gradients() -> bool:
    """Whether a gradient that forward makes may be kept for backward, which then gives it away once.

    Not in a graph that is run many times, an exported or a recorded one, nor where hooks ask for what is saved.
    """
    if is_compiling():
        return not is_exporting()
    recorded = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # by make_fx
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None and not recorded
