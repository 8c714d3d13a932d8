"""The ways a tensor may lie in memory, in one table."""

from collections.abc import Callable

import torch
from torch import Tensor


def _sliced(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _swapped(x: Tensor, one: int, other: int) -> Tensor:
    return x.transpose(one, other).contiguous().transpose(one, other)


def _reversed(x: Tensor) -> Tensor:
    order = range(x.dim())[::-1]
    return x.permute(*order).contiguous().permute(*order)


def _misaligned(x: Tensor) -> Tensor:
    storage = x.new_empty(x.numel() + 1)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


# name: (the least dimensions it takes, the same numbers in other memory).
_SAME_NUMBERS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "contiguous": (0, lambda x: x),
    "sliced": (0, _sliced),
    "every other row": (1, lambda x: x.repeat_interleave(2, 0)[1::2]),
    "every other column": (2, lambda x: x.repeat_interleave(2, 1)[:, ::2]),
    "transposed": (2, lambda x: _swapped(x, 0, -1)),
    "inner transposed": (3, lambda x: _swapped(x, 1, -1)),
    "reversed": (2, _reversed),
    "sliced and reversed": (2, lambda x: _reversed(torch.stack([x, x], -1))[..., 0]),
    "misaligned": (0, _misaligned),
    "channels_last": (4, lambda x: x.contiguous(memory_format=torch.channels_last)),
}
# One row or column stands for all of them, so that the numbers are others.
_EXPANDED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "expanded rows": (1, lambda x: x[:1].expand_as(x)),
    "expanded columns": (2, lambda x: x[:, :1].expand_as(x)),
}
LAYOUTS = list(_SAME_NUMBERS | _EXPANDED)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in the layout; itself where it has too few dimensions for that."""
    least_dims, lay_out = (_SAME_NUMBERS | _EXPANDED)[layout]
    return lay_out(x) if x.dim() >= least_dims else x


def other_memory(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in every layout that a tensor of these dimensions may have but the contiguous one."""
    names = ["sliced", "every other row", "transposed", "misaligned"] + ["channels_last"] * (x.dim() == 4)
    return {name: laid_out(x, name) for name in names}
