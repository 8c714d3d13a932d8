"""What a call costs under ``patch()`` and in a ``scope()``, beside torch's: ``python -m benchmarks.adoption``."""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from timeit import timeit

import torch
from tabulate import tabulate  # type: ignore[import-untyped]
from torch.overrides import TorchFunctionMode

import fusedloss

from .figures import add_output, write


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


CALLS, ROUNDS = 100, 100


def timed(call: Callable[[], object], side: str) -> float:
    """Seconds of one of many calls in one context. Entering it is not timed, and the first call neither."""
    with SIDES[side]():
        call()
        return timeit(call, number=CALLS) / CALLS


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a call, by what is called and where."""
    x, y = torch.randn(8, 10), torch.arange(8)
    called: dict[str, Callable[[], object]] = {
        "cross_entropy of (8, 10)": lambda: torch.nn.functional.cross_entropy(x, y),
        "torch.add of (8, 10)": lambda: torch.add(x, x),
    }
    times = {
        name: [{side: timed(call, side) for side in SIDES} for _ in range(rounds)] for name, call in called.items()
    }
    return {name: {side: median(each[side] for each in found) for side in SIDES} for name, found in times.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adoption", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    add_output(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measured(options.rounds)
    lines = [[name, *(f"{1e6 * each:.2f}" for each in sides.values())] for name, sides in found.items()]
    print(tabulate(lines, headers=["us", *SIDES], tablefmt="github"))
    write(options.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
