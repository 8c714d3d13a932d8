"""Loads the compiled extension, or says why the package runs natively without it."""

import os
from types import ModuleType

import torch  # noqa: F401  (its libraries must be loaded before the extension that links to them)


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FUSEDLOSS_DISABLE") == "1":
        return None, "FUSEDLOSS_DISABLE=1"
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the extension is not built, or built for another torch: {error}"
    _C.cpu_isa()  # a FUSEDLOSS_CPU_ISA this machine does not have raises here, not at the first loss
    return _C, ""


extension, why_native = _load()
