"""``python -m fusedloss run script.py [arguments]``: a script as it is, its losses fused."""

import runpy
import sys
from pathlib import Path

from ._patch import patch


def run(arguments: list[str]) -> int:
    """Runs the script as ``__main__``, and prints the report to stderr at its end, however that comes."""
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
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        print(f"fusedloss: {patched.report()}", file=sys.stderr)
        patched.undo()
    return 0
