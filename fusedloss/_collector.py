"""Python's garbage collector, paused while the package is imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # noqa: F401, so that its import is not within the pause


@contextmanager
def paused() -> Iterator[None]:
    """No collection until the block ends.

    What an import makes stays. Its 12,000 objects would still set off a walk over all that torch has made, 170,000
    objects, to free nothing: as long as the import itself.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
