"""What memory that was never touched costs, and which settings spare it: ``python -m benchmarks.pages``.

A large tensor is new memory from the system, and its first writing takes a page fault for each 4 kB. Here a copy of
64 MB into new memory stands beside one into memory that was written before, and beside both a step of cross-entropy,
whose gradient is new memory too. Each setting of the allocator is a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate  # type: ignore[import-untyped]

import fusedloss.functional as L

from .figures import add_output, write

ROOT = Path(__file__).parent.parent
GIGABYTE = str(1 << 30)
# Above these sizes glibc returns memory to the system. MMAP_MAX_=0 makes no tensor a mapping of its own.
KEEP = {"MALLOC_TRIM_THRESHOLD_": GIGABYTE, "MALLOC_TOP_PAD_": GIGABYTE}
SETTINGS = {
    "the default": {},
    "glibc keeps up to 1 GB": {"MALLOC_MMAP_THRESHOLD_": GIGABYTE, **KEEP},
    "glibc makes no mappings": {"MALLOC_MMAP_MAX_": "0", **KEEP},
    "torch asks for huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "jemalloc": {"LD_PRELOAD": "jemalloc"},
    "tcmalloc": {"LD_PRELOAD": "tcmalloc_minimal"},
}
COPY, ROWS, CLASSES = 1 << 24, 512, 32_000  # 64 MB of float32, as the logits are
NAMES = ("copy into new memory", "copy into warm memory", "cross-entropy")


def calls() -> dict[str, Callable[[], object]]:
    source, warm = torch.randn(COPY), torch.zeros(COPY)
    logits = torch.randn(ROWS, CLASSES).requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))

    def step() -> object:
        return torch.autograd.grad(L.cross_entropy(logits, target), logits)

    return dict(zip(NAMES, (source.clone, lambda: warm.copy_(source), step), strict=True))


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds and page faults of each call, in this process."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    faults: dict[str, list[int]] = {name: [] for name in NAMES}
    every = calls()
    for number in range(rounds + 3):  # three to warm up
        for name, call in every.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, perf_counter()
            call()  # what it returns is given back at once, as a step gives back its gradient
            taken = perf_counter() - start
            if number >= 3:
                seconds[name].append(taken)
                faults[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {name: {"seconds": median(seconds[name]), "faults": median(faults[name])} for name in NAMES}


def under(setting: dict[str, str], rounds: int) -> dict[str, Any]:
    """The figures of a process with these variables, or why there are none."""
    setting = dict(setting)
    if wanted := setting.get("LD_PRELOAD"):
        if not (library := find_library(wanted)):
            return {"skipped": f"{wanted} is not installed"}
        setting["LD_PRELOAD"] = library
    command = [sys.executable, "-m", "benchmarks.pages", "--here", "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **setting}, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"expected figures under {setting}, got {done.stderr}")
    return {"figures": json.loads(done.stdout), "environment": setting}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    add_output(parser)
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(measured(options.rounds)))
        return 0
    found = {name: under(setting, options.rounds) for name, setting in SETTINGS.items()}
    lines = []
    for name, each in found.items():
        figures = each.get("figures")
        told = [f"{1e3 * one['seconds']:.2f} ms, {one['faults']:.0f}" for one in (figures or {}).values()]
        lines.append([name, *(told or [each["skipped"]])])
    print(tabulate(lines, headers=["milliseconds and page faults", *NAMES], tablefmt="github"))
    write(options.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
