"""Measures every case of a device and prints tables of ratios to torch and other packages. On a CPU it fails where a
gradient of torch.compile is not eager's.

A whole run writes its figures into benchmarks/results: <gpu>.json, with which it also makes the documents anew, or
<cpu>-<n>-threads.json for each count of threads. ``make report`` makes the documents.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fusedloss._library import extension, why_native

from . import compiling, machine, peers, table, terminal, timing_cpu
from .case import Case
from .cases import cpu_cases, cpu_sweeps, cuda_cases
from .measure import Clock, Measured, measure
from .report.__main__ import main as report
from .results import OURS, Results, Row, file_name
from .timing_cuda import ColdCache, CudaClock, copy_bandwidth


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if why := why_not(options.device):
        print(f"nothing can be measured: {why}", file=sys.stderr)
        return 1
    every = cuda_cases(options.quick) if options.device == "cuda" else (*cpu_cases(not options.slow), *cpu_sweeps())
    cases = [case for case in every if options.only in case.name]
    if not cases:
        print(f"no case has {options.only!r} in its name", file=sys.stderr)
        return 1
    runs = list(on_gpu(cases, options) if options.device == "cuda" else on_cpu(cases, options))
    wrong = [f"{row.case}: {name}: {why}" for run in runs for row in run.rows for name, why in row.missing.items()]
    if options.device == "cpu" and wrong:
        print("not measured:", *wrong, sep="\n", file=sys.stderr)
        return 1
    unmet = [goal for run in runs for row in run.rows for goal in row.unmet(run.copy_bandwidth)]
    if options.enforce and unmet:
        print("goals not met:", *unmet, sep="\n", file=sys.stderr)
        return 1
    return 0


def on_cpu(cases: list[Case], options: argparse.Namespace) -> list[Results]:
    """A run for each count of threads; they share the inputs, the gradients that are compared, and compilations."""
    began = time.perf_counter()
    if not options.no_compile:
        compiling.ahead(cases, options.threads)
    runs: dict[int, Results] = {}
    for count in options.threads:
        torch.set_num_threads(count)
        runs[count] = Results(machine.facts("cpu"), timing_cpu.copy_bandwidth(), [])
        print(f"{count} threads copy {runs[count].copy_bandwidth / 1e9:.3g} GB/s")  # type: ignore[operator]

    def clock(calls: dict[str, timing_cpu.Timed], timed: str) -> timing_cpu.Times:
        return timing_cpu.clock(calls, timed, options.seconds)

    family = None
    for case in cases:
        if case.family != family:
            print(terminal.head(family := case.family))
        for row, _, count in measure(case, clock, not options.no_compile, threads=options.threads):
            runs[count].rows.append(row)
            print(*terminal.lines(row, count), sep="\n", flush=True)
    print(*terminal.ending([row for results in runs.values() for row in results.rows]), sep="\n")
    for results in runs.values():
        write(results, options)
    print(f"took {time.perf_counter() - began:.0f} s, {cpu_seconds():.0f} CPU-seconds")
    return list(runs.values())


def cpu_seconds() -> float:
    """Of this process and of those it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def on_gpu(cases: list[Case], options: argparse.Namespace) -> list[Results]:
    cold = ColdCache()
    clock, bandwidth = CudaClock(options.rounds, cold), copy_bandwidth(options.rounds, cold)
    results = Results(machine.facts("cuda"), bandwidth, [])
    for case in cases:
        for row, *_ in measured_on_gpu(case, clock, options, results.skipped):
            results.rows.append(row)
            print(line(row), flush=True)
        write(results, options)  # after each case: a run cut short leaves what it has
    print("", *table.lines(results), sep="\n")
    if options.output is None and whole(options):
        report([])
    return [results]


def whole(options: argparse.Namespace) -> bool:
    return not (options.quick or options.only or options.no_compile)


def write(results: Results, options: argparse.Namespace) -> None:
    path = options.output
    if path is None:
        if not whole(options):
            return
        path = table.RESULTS
    results.write(path if path.suffix == ".json" else path / file_name(results.machine))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="the cases whose name has this in it")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--enforce", action="store_true", help="fail where a goal is not met")
    parser.add_argument(
        "--output",
        type=Path,
        help="write the figures to this .json file or folder; leaves the document alone",
    )
    on_cpu = parser.add_argument_group("on a CPU")
    on_cpu.add_argument("--threads", type=int, nargs="+", default=threads(), help="that torch may use (default: 2 1)")
    on_cpu.add_argument("--slow", action="store_true", help="also calls of seconds, and more small sizes")
    on_cpu.add_argument(
        "--seconds",
        type=float,
        default=timing_cpu.SECONDS,
        help="for each case and count of threads (default: %(default)s)",
    )
    on_gpu = parser.add_argument_group("on a GPU")
    on_gpu.add_argument("--quick", action="store_true", help="a few cases of each kind")
    on_gpu.add_argument("--rounds", type=int, default=25, help="timed calls of each provider (default: 25)")
    options = parser.parse_args(arguments)
    if min(options.threads) < 1 or len(set(options.threads)) < len(options.threads):
        parser.error(f"--threads must be different counts of at least 1, got {options.threads}")
    if options.output and options.output.suffix == ".json" and options.device == "cpu" and len(options.threads) > 1:
        parser.error(f"each count of threads has a file of its own: --output must be a folder, got {options.output}")
    return options


def threads() -> list[int]:
    """The greatest comes first, since torch.compile's work is done for it: no time is lost."""
    return [2, 1] if machine.cores() > 1 else [1]


def why_not(device: str) -> str:
    if extension is None:
        return f"fusedloss runs without its extension: {why_native}"
    if device == "cuda" and (extension.cuda_architectures == "none" or not torch.cuda.is_available()):
        return "expected a GPU and an extension built with its CUDA kernels"
    return ""


def measured_on_gpu(
    case: Case, clock: Clock, options: argparse.Namespace, skipped: dict[str, str]
) -> Iterator[Measured]:
    """The rows of a case; where a GPU's memory is too small for it or for a part of it, why it is skipped."""
    found, missing = peers.installed(case.peers)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if case.most_bytes > free:
        skipped[case.name] = f"skipped: needs {case.most_bytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
    if case.name not in skipped:
        try:
            yield from measure(case, clock, not options.no_compile, found, missing)
        except torch.cuda.OutOfMemoryError as error:
            skipped[case.name] = f"in part skipped: {peers.describe(error)}"
    if case.name in skipped:
        print(f"{case.name}: {skipped[case.name]}", flush=True)


def line(row: Row) -> str:
    ratios = ", ".join(f"{row.speedup(name):.2f}x {name}" for name in row.seconds if name != OURS)
    return f"{row.case}, {row.timed}: {table.duration(row.seconds[OURS])}, {ratios}"


if __name__ == "__main__":
    sys.exit(main())
