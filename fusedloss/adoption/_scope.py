"""Fused losses for one thread."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._places import places
from ._replacement import is_transformed, knows_originals

_PLAIN = {(), (Tensor,)}  # the types that override, where none of a user's does


class scope(TorchFunctionMode):
    """Within ``with fusedloss.scope():`` the losses of torch.nn are fused, in this thread alone.

    By a TorchFunctionMode, which every function of torch passes through: that takes about a microsecond each. It
    reaches names that were imported before, too.

    >>> import torch
    >>> from torch.nn.functional import mse_loss
    >>> with scope():
    ...     mse_loss(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(4.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._ours = {getattr(place.owner, place.name): place.ours for place in places("torch")}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = self._ours.get(func)
        if ours is None or types not in _PLAIN or knows_originals() or is_transformed():
            return func(*args, **kwargs) if kwargs else func(*args)
        return ours(*args, **kwargs) if kwargs else ours(*args)
