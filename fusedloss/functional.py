"""The losses as functions, with the names and positional arguments of ``torch.nn.functional``."""

from .pointwise import *  # noqa: F403
from .pointwise import __all__ as _pointwise
from .softmax import *  # noqa: F403
from .softmax import __all__ as _softmax

__all__ = [*_pointwise, *_softmax]
