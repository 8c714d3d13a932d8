"""Questions about sizes that a compiler may keep open, answered without pinning them down.

What only the data can tell, such as the number of rows that a mask picks, is taken to fit: the op looks again when it
runs.
"""

from typing import Any

import torch
from torch.compiler import is_compiling

# torch.fx.experimental.symbolic_shapes loads SymPy, half a second that only a compiler has to spend.


def same_size(n: int, m: int) -> bool:
    if not is_compiling():
        return n == m
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return not guard_or_false(n != m)


def same_shape(shape: torch.Size, other: torch.Size) -> bool:
    return len(shape) == len(other) and all(same_size(n, m) for n, m in zip(shape, other, strict=True))


# Compared one by one: `n in (1, m)` does not ask a size that the compiler keeps open.
def broadcasts_to(shape: torch.Size, full: torch.Size) -> bool:
    return len(shape) <= len(full) and all(
        _is_one(n) or same_size(n, m) for n, m in zip(shape[::-1], full[::-1], strict=False)
    )


def broadcasts_with(shape: torch.Size, other: torch.Size) -> bool:
    return all(_is_one(n) or _is_one(m) or same_size(n, m) for n, m in zip(shape[::-1], other[::-1], strict=False))


def is_empty(tensor: torch.Tensor) -> bool:
    """Whether a tensor is known to be empty."""
    if not is_compiling():
        return tensor.numel() == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(tensor.numel() == 0)


def exceeds(size: int, most: int) -> bool:
    """Whether a size is known to be above a number."""
    if not is_compiling():
        return size > most
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size > most)


def at_most(size: int, most: int) -> bool:
    """Whether a size is known to be no more than a number."""
    if not is_compiling():
        return size <= most
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size <= most)


def rows_of(logits: torch.Tensor) -> torch.Size:
    """The sizes without that of the classes."""
    class_dim = min(logits.dim() - 1, 1)
    return logits.shape[:class_dim] + logits.shape[class_dim + 1 :]


def is_open(number: int | torch.SymInt) -> bool:
    """Whether a compiler keeps a number open that is no size."""
    if not is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


def pinned(number: Any) -> Any:
    """The number that a compiler keeps open, or what is given as it is: an op's parameters are part of the graph."""
    if not isinstance(number, int | float | torch.SymInt | torch.SymFloat):
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    return guard_scalar(number)


def _is_one(n: int) -> bool:
    if not is_compiling():
        return n == 1
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(n == 1)
