"""Loads the compiled extension, or says why the package runs natively without it."""

import os
from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the extension that links to them)


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FUSEDLOSS_DISABLE") == "1":
        return None, "FUSEDLOSS_DISABLE=1"
    try:
        library = import_module("fusedloss._C")
    except ModuleNotFoundError:
        return None, "the extension is not built"
    except ImportError as error:
        return None, f"the extension does not load; was it built for another torch? {error}"
    library.cpu_isa()  # a FUSEDLOSS_CPU_ISA this machine does not have raises here, not at the first loss
    return library, ""


extension, why_native = _load()


def check() -> None:
    """Raise what a GPU has met and could not raise: a class target out of range, or a negative variance, in an earlier
    call.

    The loss of such a call is NaN; the gradient of such a row is zero, and that of such a variance NaN. Waits for
    nothing: call ``torch.cuda.synchronize()`` first to hear of everything submitted so far. The next call of such a
    loss on a GPU checks too. On the CPU a call raises at once, and there is nothing left to tell.

    Raises:
        IndexError: naming target, row and device; once for each device that met one.
        ValueError: for a variance; likewise.

    >>> check()
    """
    if extension is not None:
        extension.check()
