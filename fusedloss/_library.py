"""Loads the compiled extension, or says why the package runs natively without it."""

import json
import os
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch  # its libraries must be loaded before the extension that links to them

_HERE = Path(__file__).parent
_ANEW = "pip install --no-build-isolation --force-reinstall --no-deps ."
_CHOSEN = "FUSEDLOSS_DISABLE=1", "FUSEDLOSS_NO_EXTENSION=1 when it was built"


def _recorded() -> dict[str, str]:
    """What setup.py knew when it built the extension, or why it did not."""
    try:
        text = (_HERE / f"_C{EXTENSION_SUFFIXES[0]}").with_suffix(".json").read_text()
    except OSError:
        return {}
    known: dict[str, str] = json.loads(text)
    return known


def _never_built() -> str:
    if (_HERE.parent / "setup.py").exists():
        return (
            f"the extension is not built in {_HERE}, a folder of sources, which Python imports in place of an "
            "installed copy. `pip install --no-build-isolation -e .` builds it there"
        )
    return "the extension is not built"


def _of_another_torch(built_for: str) -> str:
    """A release is compared, and not whether it is for a CPU or for which CUDA."""
    if built_for.split("+")[0] == torch.__version__.split("+")[0]:
        return ""
    return f"built for torch {built_for}, this is {torch.__version__}. Build it anew: {_ANEW}"


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("FUSEDLOSS_DISABLE") == "1":
        return None, _CHOSEN[0]
    recorded = _recorded()
    if "torch" in recorded and (why := _of_another_torch(recorded["torch"])):
        return None, why
    try:
        library = import_module("fusedloss._C")
    except ModuleNotFoundError:
        return None, recorded.get("reason") or _never_built()
    except ImportError as error:
        return None, f"the extension does not load: {error}. Build it anew: {_ANEW}"
    if why := _of_another_torch(library.torch_version):
        return None, why
    library.cpu_isa()  # a FUSEDLOSS_CPU_ISA this machine does not have raises here, not at the first loss
    return library, ""


extension, why_native = _load()
by_accident = extension is None and why_native not in _CHOSEN


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
