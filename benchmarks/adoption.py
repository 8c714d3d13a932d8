"""What a call costs under ``patch()`` and in a ``scope()``, beside torch's: ``python -m benchmarks.adoption``."""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from tabulate import tabulate  # type: ignore[import-untyped]
from torch.overrides import TorchFunctionMode

import fusedloss

from .figures import add_output, write
from .timing_cpu import in_turn


class Nothing(TorchFunctionMode):
    """A mode that only hands calls on: what any mode costs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


SIDES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "torch": nullcontext,
    "patch()": fusedloss.patch,
    "scope()": fusedloss.scope,
    "a mode that does nothing": Nothing,
}


def inside(side: str, call: Callable[[], object], calls: int = 200) -> Callable[[], object]:
    """So many calls within one context, whose entry is then a small part."""

    def run() -> None:
        with SIDES[side]():
            for _ in range(calls):
                call()

    return run


def measured(seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of a call, by what is called and where."""
    x, y, calls = torch.randn(8, 10), torch.arange(8), 200
    called: dict[str, Callable[[], object]] = {
        "cross_entropy of (8, 10)": lambda: torch.nn.functional.cross_entropy(x, y),
        "torch.add of (8, 10)": lambda: torch.add(x, x),
    }
    found = {}
    for name, call in called.items():
        times = in_turn({side: inside(side, call, calls) for side in SIDES}, 1, seconds)
        found[name] = {side: times.seconds(side) / calls for side in SIDES}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adoption", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure each call")
    add_output(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measured(options.seconds)
    lines = [[name, *(f"{1e6 * each:.2f}" for each in sides.values())] for name, sides in found.items()]
    print(tabulate(lines, headers=["us", *SIDES], tablefmt="github"))
    write(options.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
