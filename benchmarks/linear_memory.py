"""Memory and digits of the linear loss beside eager's: ``python -m benchmarks.linear_memory``.

Memory is the peak of the resident set, which also has what torch's matrix products allocate for themselves. So each
figure is a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor

from .case import name_of
from .figures import add_output, write
from .losses import eager_linear, fused_linear
from .measure import error, gradients
from .results import EAGER, OURS

ROOT = Path(__file__).parent.parent
LOSSES = {EAGER: eager_linear, OURS: fused_linear}
SIZES = [(2048, 512, 32_000), (512, 1024, 128_256)]
DIGITS = (1024, 512, 16_000)
DTYPES = [torch.float32, torch.bfloat16]


def data(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
    rows, features, classes = size
    generator = torch.Generator().manual_seed(0)
    # Made in the dtype: the largest resident set so far would have a float32 copy in it.
    input = torch.randn(rows, features, generator=generator, dtype=dtype)
    head = torch.randn(classes, features, generator=generator, dtype=dtype).div_(features**0.5)
    return (input.requires_grad_(), head.requires_grad_()), torch.randint(classes, (rows,), generator=generator)


def resident() -> int:
    """The largest resident set so far, in bytes; ru_maxrss counts kilobytes on Linux and bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def peak(provider: str, size: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes beyond the inputs and their gradients, of the first step of this process."""
    inputs, target = data(size, dtype)
    gradients(LOSSES[provider], *data((8, 8, 8), dtype))  # what torch loads at its first products
    before = resident()
    gradients(LOSSES[provider], inputs, target)
    return resident() - before - sum(each.nbytes for each in inputs)


def peak_in_a_process(provider: str, size: tuple[int, int, int], dtype: torch.dtype) -> int:
    told = json.dumps([provider, size, str(dtype).removeprefix("torch.")])
    command = [sys.executable, "-m", "benchmarks.linear_memory", "--here", told]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"expected the peak of {told}, got {done.stderr}")
    return int(done.stdout)


def memory() -> dict[str, dict[str, int]]:
    return {
        name_of("linear_cross_entropy", size, dtype): {name: peak_in_a_process(name, size, dtype) for name in LOSSES}
        for dtype in DTYPES
        for size in SIZES
    }


def digits() -> dict[str, dict[str, list[float]]]:
    """The distance of both gradients from float64's of the same inputs, over its norm."""
    found = {}
    for dtype in DTYPES:
        inputs, target = data(DIGITS, dtype)
        exact = gradients(eager_linear, tuple(each.detach().double().requires_grad_() for each in inputs), target)
        found[name_of("linear_cross_entropy", DIGITS, dtype)] = {
            name: [error(*pair) for pair in zip(gradients(loss, inputs, target), exact, strict=True)]
            for name, loss in LOSSES.items()
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_memory", description=__doc__)
    parser.add_argument("--here", type=json.loads, help="measure [provider, sizes, dtype] in this process")
    add_output(parser)
    options = parser.parse_args(arguments)
    if options.here:
        provider, size, dtype = options.here
        print(peak(provider, tuple(size), getattr(torch, dtype)))
        return 0
    held, off = memory(), digits()
    lines = [[case, *(f"{each / 1e6:.0f}" for each in peaks.values())] for case, peaks in held.items()]
    print(tabulate(lines, headers=["MB beside the gradients", *LOSSES], tablefmt="github"))
    lines = [[case, name, *(f"{each:.2e}" for each in one)] for case, both in off.items() for name, one in both.items()]
    print(tabulate(lines, headers=["off from float64", "", "input", "head"], tablefmt="github"))
    write(options.output, {"peak": held, "digits": off})
    return 0


if __name__ == "__main__":
    sys.exit(main())
