"""``python -m fusedloss run script.py [arguments]``: a script as it is, its losses fused."""

import atexit
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from ._patch import Patch, patch
from ._places import SITES, Site


class _OnImport(MetaPathFinder):
    """Puts our losses into each module of the other packages right after a script has imported it."""

    def __init__(self, patched: Patch) -> None:
        self._patched = patched
        self._ours: set[int] = set()
        self.missing: list[str] = []
        self._sites: dict[str, list[Site]] = {}
        for package, sites in SITES.items():
            for site in sites if package != "torch" else []:
                self._sites.setdefault(site.module, []).append(site)
        for module in self._sites.keys() & sys.modules.keys():
            self._fuse(module)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._sites:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fuse(module: ModuleType) -> None:
                execute(module)
                self._fuse(name)

            spec.loader.exec_module = execute_and_fuse  # type: ignore[method-assign]
        return spec

    def _fuse(self, module: str) -> None:
        for site in self._sites[module]:
            try:
                place = site.place()
            except AttributeError:
                self.missing.append(f"{site.module}.{site.name}")
                continue
            if id(getattr(place.owner, place.name)) not in self._ours:  # imported from a module that has ours already
                self._patched.hold(place)
                self._ours.add(id(getattr(place.owner, place.name)))


def run(arguments: list[str]) -> int:
    """Runs the script as ``__main__``; the report is printed to stderr when the process ends, however it does.

    Torch's losses are fused from the start, those of the other packages as they are imported.
    """
    if not arguments:
        print("usage: python -m fusedloss run script.py [arguments]", file=sys.stderr)
        return 2
    script, *_ = arguments
    if not Path(script).is_file():
        print(f"fusedloss: no file {script}", file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = str(Path(script).resolve().parent)
    patched = patch()
    others = _OnImport(patched)
    sys.meta_path.insert(0, others)

    def report() -> None:
        print(f"fusedloss: {patched.report()}", file=sys.stderr)
        if others.missing:
            print(f"not in the installed version: {', '.join(others.missing)}", file=sys.stderr)

    atexit.register(report)  # after the script's threads have ended, and after a traceback
    runpy.run_path(script, run_name="__main__")
    return 0
