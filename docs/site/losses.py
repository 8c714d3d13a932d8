"""A page for each loss, made of its docstrings, its signature, the benchmarks and docs/differences.md.

Nothing here names a loss: what ``fusedloss.functional`` has gets a page.
"""

import importlib
import inspect
import re
from pathlib import Path

import torch
import torch.nn.functional as F

import fusedloss
from fusedloss import functional

from .calls import dtypes
from .differences import differences
from .traffic import counted


def function_of(module: type) -> str | None:
    """The function that a module's docstring names first."""
    found = re.search(r":func:`fusedloss\.functional\.(\w+)`", module.__doc__ or "")
    return found[1] if found else None


MODULES = {
    name: function
    for name, value in vars(fusedloss).items()
    if name in fusedloss.__all__ and inspect.isclass(value) and (function := function_of(value))
}


COUNTED = """What the kernels must read and write at least in the cases that the benchmarks measure: passes over the
inputs, times their elements, times the bytes of one, and what is read besides. Of a linear loss, the operations of its
matrix products. [Performance](../docs/performance.md) has the times.
"""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]), ""]


def spelt(annotation: object) -> str:
    """A type without the modules that its parts come from."""
    text = inspect.formatannotation(annotation)
    return "`" + re.sub(r"\b(\w+\.)+", "", text).replace("|", r"\|") + "`"


def options(name: str) -> list[str]:
    """Every argument with its type and default, and whether torch's function of that name has it."""
    own, torchs = inspect.signature(getattr(functional, name)), getattr(F, name, None)
    known = inspect.signature(torchs).parameters if torchs else {}
    rows = []
    for parameter in own.parameters.values():
        default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        place = "yes" if parameter.name in known else "no"
        rows.append([f"`{parameter.name}`", spelt(parameter.annotation), default, place])
    head = ["argument", "type", "default", "in torch"]
    width = 4 if torchs else 3  # without torch's function there is nothing to compare
    return table(head[:width], [row[:width] for row in rows])


def page(name: str, moved: list[list[str]], found: list[str]) -> str:
    lines = [f"# {name}", "", "```{eval-rst}", f".. autofunction:: fusedloss.functional.{name}", "```", ""]
    lines += ["## Options", *options(name)]
    if paths := dtypes(name):
        lines += ["## Dtypes", "", "What computes the docstring's first example on a CPU, by the dtype of its tensors:"]
        lines += table(["dtype", "path"], paths)
    lines += ["## Bytes moved", ""]
    if moved:
        lines += [COUNTED, *table(["case", "device", "what is timed", "counted"], moved)]
    else:
        lines += ["No benchmark measures this function alone; see [performance](../docs/performance.md).", ""]
    lines += ["## Differences from torch", "", *found, ""]
    lines += ["What holds for several losses: [where results differ](../docs/differences.md).", ""]
    for module in (module for module, function in MODULES.items() if function == name):
        lines += [f"## {module}", "", "```{eval-rst}", f".. autoclass:: fusedloss.{module}", "```", ""]
    return "\n".join(lines)


def index() -> str:
    """The losses by family, a file of ``fusedloss/losses`` each."""
    lines = ["# Losses", "", "```{eval-rst}", ".. automodule:: fusedloss.functional", "```", ""]
    lines += ["The page of a function has its module too.", ""]
    families = dict.fromkeys(getattr(functional, name).__module__ for name in functional.__all__)
    for family in families:
        title = (importlib.import_module(family).__doc__ or family).splitlines()[0].rstrip(".")
        names = [name for name in functional.__all__ if getattr(functional, name).__module__ == family]
        lines += [f"## {title}", "", "```{eval-rst}", ".. currentmodule:: fusedloss.functional", ""]
        lines += [".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names), "```", ""]
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *functional.__all__, "```", ""])


def pages(document: str) -> dict[Path, str]:
    torch.set_num_threads(1)
    moved, found = counted(), differences(document, MODULES)
    made = {Path("losses", f"{name}.md"): page(name, moved.get(name, []), found[name]) for name in functional.__all__}
    return {**made, Path("losses", "index.md"): index()}
