"""Pages of the names that are no loss of a single process: of the package itself, and of its public parts."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import fusedloss

from . import losses

PAGES = ["fusedloss", "fusedloss.parallel", "fusedloss.integrations.transformers"]


def names(module: ModuleType) -> list[str]:
    """What the module offers and no page of a loss has."""
    if module is fusedloss:
        return [name for name in module.__all__ if name not in losses.MODULES and name != "functional"]
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return list(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


def made(module: ModuleType) -> list[type]:
    """The classes that only its functions make: their own constructors are no part of what it offers."""
    functions = [getattr(module, name) for name in names(module) if inspect.isfunction(getattr(module, name))]
    found = [inspect.signature(function, eval_str=True).return_annotation for function in functions]
    return [each for each in found if inspect.isclass(each) and each.__module__.startswith("fusedloss.")]


def page(module: ModuleType) -> str:
    summary = (inspect.getdoc(module) or "").splitlines()[0]
    lines = [f"# {module.__name__}", "", summary, "", "```{eval-rst}", f".. currentmodule:: {module.__name__}", ""]
    results = made(module)
    for name in names(module):
        value = getattr(module, name)
        if not inspect.isclass(value):
            lines += [f".. autofunction:: {name}", ""]
        elif value not in results:
            lines += [f".. autoclass:: {name}", "   :members:", ""]
    for value in results:
        home = module.__name__ if value.__name__ in vars(module) else value.__module__.partition("._")[0]
        lines += [f".. autoclass:: {home}.{value.__name__}()", "   :members:", ""]
    return "\n".join([*lines, "```", ""])


def pages() -> dict[Path, str]:
    return {Path("api", f"{name}.md"): page(importlib.import_module(name)) for name in PAGES}
