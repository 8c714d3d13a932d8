"""Warnings that name the line that torch's would name."""

import sys
import warnings
from types import CodeType

# Of functions that stand in the place of torch's: their frames are between a loss and its caller.
stand_ins: set[CodeType] = set()


def warn(message: str, stacklevel: int) -> None:
    """:func:`warnings.warn`, past a stand-in."""
    past = sys._getframe(stacklevel).f_code in stand_ins
    warnings.warn(message, stacklevel=stacklevel + 1 + past)
