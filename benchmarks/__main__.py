"""Measures every case of a device and prints the table of ratios to torch and other packages.

A whole run on a GPU writes benchmarks/results/<gpu>.json and the table in docs/performance.md.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedloss._library import extension, why_native

from . import machine, peers, table, timing_cpu
from .case import Case
from .cases import cpu_cases, cuda_cases
from .measure import Clock, measure
from .results import OURS, Results, Row
from .timing_cuda import ColdCache, CudaClock, copy_bandwidth


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if why := why_not(options.device):
        print(f"nothing can be measured: {why}", file=sys.stderr)
        return 1
    on_gpu = options.device == "cuda"
    cases = [case for case in (cuda_cases if on_gpu else cpu_cases)(options.quick) if options.only in case.name]
    if not cases:
        print(f"no case has {options.only!r} in its name", file=sys.stderr)
        return 1

    clock: Clock = timing_cpu.clock
    bandwidth = None
    if on_gpu:
        cold = ColdCache()
        clock, bandwidth = CudaClock(options.rounds, cold), copy_bandwidth(options.rounds, cold)
    else:
        torch.set_num_threads(options.threads)
    facts = machine.facts(options.device)
    results = Results(facts, bandwidth, [])
    whole = on_gpu and not options.quick and not options.only and not options.no_compile
    output = options.output
    if output is None and whole:
        output = table.RESULTS / f"{re.sub('[^a-z0-9]+', '-', facts['device'].lower()).strip('-')}.json"
    for case in cases:
        for row in rows(case, clock, options, results.skipped):
            results.rows.append(row)
            print(line(row), flush=True)
        if output is not None:
            results.write(output)  # after each case: a run cut short leaves what it has
    print("", *table.lines(results), sep="\n")
    if output is not None:
        print(f"written: {output}")
    if options.output is None and whole:
        table.update()
    unmet = [goal for row in results.rows for goal in row.unmet(results.copy_bandwidth)]
    if options.enforce and unmet:
        print("goals not met:", *unmet, sep="\n", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="the cases whose name has this in it")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--enforce", action="store_true", help="fail where a goal is not met")
    parser.add_argument("--output", type=Path, help="write the figures to this .json file; leaves the document alone")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU: threads torch may use (default: 2)")
    parser.add_argument(
        "--quick", action="store_true", help="a few cases of each kind on a GPU; on a CPU those of milliseconds"
    )
    parser.add_argument("--rounds", type=int, default=25, help="on a GPU: timed calls of each provider (default: 25)")
    return parser.parse_args(arguments)


def why_not(device: str) -> str:
    if extension is None:
        return f"fusedloss runs without its extension: {why_native}"
    if device == "cuda" and (extension.cuda_architectures == "none" or not torch.cuda.is_available()):
        return "expected a GPU and an extension built with its CUDA kernels"
    return ""


def rows(case: Case, clock: Clock, options: argparse.Namespace, skipped: dict[str, str]) -> Iterator[Row]:
    """The rows of a case; where a GPU's memory is too small for it or for a part of it, why it is skipped."""
    found, missing = peers.installed(case.peers)
    if case.device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if case.most_bytes > free:
            skipped[case.name] = f"skipped: needs {case.most_bytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    if case.name not in skipped:
        try:
            yield from (row for row, _ in measure(case, clock, not options.no_compile, found, missing))
        except torch.cuda.OutOfMemoryError as error:
            skipped[case.name] = f"in part skipped: {peers.describe(error)}"
    if case.name in skipped:
        print(f"{case.name}: {skipped[case.name]}", flush=True)


def line(row: Row) -> str:
    ratios = ", ".join(f"{row.speedup(name):.2f}x {name}" for name in row.seconds if name != OURS)
    return f"{row.case}, {row.timed}: {table.duration(row.seconds[OURS])}, {ratios}"


if __name__ == "__main__":
    sys.exit(main())
