"""Measures every case on the GPU, writes benchmarks/results/<gpu>.json and the table in docs/performance.md."""

import argparse
import re
import sys
from pathlib import Path

import torch

from fusedloss._library import extension

from . import machine, measure, peers, table
from .cases import cases
from .results import OURS, Results, Row
from .timing import ColdCache, copy_bandwidth


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases; writes nothing unless --output says where")
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each provider (default: 25)")
    parser.add_argument("--output", type=Path, help="another .json file than that of this GPU; leaves the table alone")
    options = parser.parse_args(arguments)
    if extension is None or extension.cuda_architectures == "none" or not torch.cuda.is_available():
        print("expected a GPU and an extension built with its CUDA kernels", file=sys.stderr)
        return 1

    cold = ColdCache()
    facts = machine.facts()
    results = Results(facts, copy_bandwidth(options.rounds, cold), [])
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"B = {results.copy_bandwidth / 1e9:.0f} GB/s", flush=True)
    found, missing = peers.installed()
    for case in cases(options.quick):
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if case.most_bytes > free:
            results.skipped[case.name] = f"skipped: needs {case.most_bytes / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            print(f"{case.name}: {results.skipped[case.name]}", flush=True)
            continue
        try:
            for row in measure.rows(case, found, missing, options.rounds, cold):
                results.rows.append(row)
                print(line(row, results.copy_bandwidth), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            results.skipped[case.name] = f"in part skipped: {peers.describe(error)}"
            print(f"{case.name}: {results.skipped[case.name]}", flush=True)

    for name, why in missing.items():
        print(f"{name}: {why}")
    output = options.output
    if output is None and not options.quick:
        output = table.RESULTS / f"{re.sub('[^a-z0-9]+', '-', facts['device'].lower()).strip('-')}.json"
    if output is not None:
        results.write(output)
        print(f"written: {output}")
    if options.output is None and not options.quick:
        table.update()
    return 0


def line(row: Row, copy_bandwidth: float) -> str:
    speedups = ", ".join(f"{row.speedup(name):.2f}x {name}" for name in row.seconds if name != OURS)
    share = (
        f"{row.bandwidth() / 1e9:.0f} GB/s, {100 * row.bandwidth() / copy_bandwidth:.0f} % of B, " if row.bytes else ""
    )
    goals = ", ".join(f"{goal} {verdict}" for goal, verdict in row.verdicts(copy_bandwidth))
    notes = "".join(f"; {name}: {why}" for name, why in row.missing.items())
    return f"{row.case}, {row.timed}: {row.seconds[OURS] * 1e6:.1f} us, {share}{speedups} [{goals}]{notes}"


if __name__ == "__main__":
    sys.exit(main())
