"""The tables of a CPU run, one for each family of losses."""

import statistics

from ..results import EAGER, Results, Row
from ..terminal import duration, memory
from .committed import SWEEPS, Committed, family, row_of
from .words import PROVIDERS, case, parts, ratio, shape, spread, table, where

# The README's table.
SIX = [
    "cross_entropy-fp32-512x32000",
    "cross_entropy-bf16-512x32000",
    "cross_entropy-fp32-4x21x256x256",
    "cross_entropy-fp32-4x10",
    "sigmoid_focal_indexed-fp32-100000x80",
    "bce_with_logits-fp32-4194304",
]
HEAD = ["case", *PROVIDERS.values(), "over eager", "over compile", "of a copy", "peak MB, fusedloss / eager"]
# Beside a linear loss: its matrix products alone, and torch's own chunks.
BESIDE = ["products", "torch's chunks"]
HALF = "_half_ignored"  # the case of a loss half of whose rows are ignored


def cells(row: Row) -> list[str]:
    times = [duration(row.seconds[name]) if name in row.seconds else "" for name in PROVIDERS]
    share = row.share_of_copy()
    ratios = [ratio(row.speedup(name)) for name in (EAGER, "compile")]
    return [case(row.case), *times, *ratios, "" if share is None else f"{100 * share:.0f} %", memory(row)]


def six(committed: Committed) -> str:
    run = committed.cpu
    made = table(HEAD, (cells(row_of(run, name)) for name in SIX))
    return f"Forward and backward of the mean: {where(run.machine)}.\n\n{made}"


def tables(committed: Committed) -> str:
    return "\n\n".join(of_run(run) for run in committed.cpus)


def of_run(run: Results) -> str:
    threads = run.machine["threads"]
    text = [f"### {run.machine['device']}, {threads} thread" + "s" * (threads != "1")]
    text.append(told(run.machine))
    if run.copy_bandwidth:
        text[-1] += f" A copy in memory, read and written: {run.copy_bandwidth / 1e9:.1f} GB/s."
    for name in dict.fromkeys(row.family for row in run.rows):
        if name not in SWEEPS:
            text += [f"**{name[:1].upper()}{name[1:]}**", family_table(family(run, name))]
    if not all(row.quiet for row in run.rows):
        text.append("Other processes held a core during a part of this run.")
    return "\n\n".join(text)


def told(machine: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device") + "."


def family_table(rows: list[Row]) -> str:
    if any(row.flops for row in rows):
        return linear_table(rows)
    return table(HEAD, (cells(row) for row in rows))


def linear_table(rows: list[Row]) -> str:
    """Times, and ours over each of the others; of memory, what lies beside inputs and gradients."""
    halves = {row.case: row for row in rows if HALF in row.case}
    head = ["case", "products", *PROVIDERS.values(), "over eager", *(f"over {name}" for name in BESIDE), "half ignored"]
    lines = []
    for row in (row for row in rows if row.case not in halves):
        times = [duration(row.seconds[name]) if name in row.seconds else "" for name in ("products", *PROVIDERS)]
        ratios = [ratio(row.speedup(name)) for name in (EAGER, *BESIDE)]
        half = halves.get(row.case.replace("-", HALF + "-", 1))
        share = f"{1 / (half.speedup('none ignored') or 1):.2f}" if half else ""
        lines.append([case(row.case) + " *" * (not row.quiet), *times, *ratios, share, memory(row)])
    return table([*head, "MB beside gradients, fusedloss / eager"], lines)


def linear(committed: Committed) -> str:
    return "\n\n".join(f"{where(run.machine)}:\n\n{linear_table(run.rows)}" for run in committed.linear)


def calls(committed: Committed) -> str:
    """How much faster the smallest calls are."""
    rows = family(committed.cpu, "calls")
    ratios = [found for row in rows if (found := row.speedup(EAGER)) is not None]
    if not ratios:
        raise ValueError("expected rows of the family calls, found none")
    faster = f"{spread(ratios)} times as fast as eager, the median {statistics.median(ratios):.2f} times"
    return f"The {len(ratios)} smallest cases of the tables are {faster} ({where(committed.cpu.machine)})."


def own_losses(committed: Committed) -> str:
    """The losses that an expression made, beside the built-in Huber of their size."""
    rows = [row for row in committed.cpu.rows if "huber" in row.seconds]
    if not rows:
        raise ValueError("expected rows of losses of one's own beside huber, found none")
    told = [f"{case(row.case)}: {1 / (row.speedup('huber') or 1):.2f} times Huber's time" for row in rows]
    return "; ".join(told) + f" ({where(committed.cpu.machine)})."


def crossover(committed: Committed) -> str:
    """From which size of the sweeps on ours is faster than eager at every larger one too."""
    lines = []
    for loss in dict.fromkeys(parts(row.case)["loss"] for row in family(committed.cpu, "by size")):
        rows = [row for row in family(committed.cpu, "by size") if parts(row.case)["loss"] == loss]
        rows.sort(key=lambda row: shape(row.case))
        slower = [i for i, row in enumerate(rows) if (row.speedup(EAGER) or 0) < 1]
        first = slower[-1] + 1 if slower else 0
        faster = [row.speedup(EAGER) or 0 for row in rows[first:]]
        if faster:
            said = f"from {case(rows[first].case)} on {spread(faster, '{:.1f}')} times as fast as eager"
        else:
            said = "slower than eager up to the largest size"
        lines.append(f"- {case(rows[0].case)} to {case(rows[-1].case)}: {said}.")
    return "\n".join(lines)
