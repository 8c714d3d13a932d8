"""Results as tables: for a terminal, and those of a GPU for docs/performance.md."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped]

from .results import OURS, Results, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUSY = "BUSY: other processes held a core throughout; such times mean little. Try again, or with fewer --threads."
PEERS = (
    "eager", "compile", "native", "huber", "products", "torch's chunks", "none ignored", "Liger", "QuACK", "CCE",
    "flash-attn",
)  # fmt: skip
# Left out where no row of a table has them.
OPTIONAL = ("bytes counted", "GB/s", "of B", "operations", "TFLOP/s", "peak memory", "memory beside gradients")


def render(all_results: Iterable[Results]) -> str:
    return "\n\n".join("\n".join(lines(results)) for results in all_results)


def lines(results: Results) -> Iterator[str]:
    machine = results.machine
    of_products = results.rows and all(row.flops for row in results.rows)
    yield f"### {machine['device']}" + ", linear losses" * bool(of_products)
    yield ""
    bandwidth = f"B = {results.copy_bandwidth / 1e9:.0f} GB/s. " if results.copy_bandwidth else ""
    yield bandwidth + ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device")
    yield ""
    yield tables(results.rows, results.copy_bandwidth)
    notes = [f"{case}: {why}" for case, why in results.skipped.items()]
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        for peer, why in row.missing.items():
            reasons.setdefault(f"{peer}: {why}", []).append(f"{row.case} {row.timed}")
    for reason, cases in reasons.items():
        notes.append(f"{reason} ({cases[0]}" + (f" and {len(cases) - 1} more)" if len(cases) > 1 else ")"))
    if not all(row.quiet for row in results.rows):
        notes.append(BUSY)
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)


def tables(rows: list[Row], copy_bandwidth: float | None) -> str:
    """One of the rows that bytes are counted of, and one of those whose cost is matrix products."""
    kinds = [row for row in rows if not row.flops], [row for row in rows if row.flops]
    return "\n\n".join(_table(kind, copy_bandwidth) for kind in kinds if kind)


def _table(rows: list[Row], copy_bandwidth: float | None) -> str:
    """One line a row; a peer has a column where any row has its figure or says why there is none."""
    named = [peer for peer in PEERS if any(peer in row.seconds or peer in row.missing for row in rows)]
    cells = [_cells(row, copy_bandwidth, named) for row in rows]
    empty = [name for name in OPTIONAL if all(line[name] == "-" for line in cells)]
    cells = [{name: cell for name, cell in line.items() if name not in empty} for line in cells]
    return tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)


def _cells(row: Row, copy_bandwidth: float | None, peers: list[str]) -> dict[str, str]:
    verdicts = [f"{goal} {verdict}" for goal, verdict in row.verdicts(copy_bandwidth)]
    cells = {
        "case": row.case,
        "timed": row.timed,
        "bytes counted": _counted(row) if row.bytes else "-",
        "operations": f"{row.flops / 1e12:.3g} TFLOP" if row.flops else "-",
        "time": duration(row.seconds[OURS]) + ("" if row.quiet else " BUSY"),
        "GB/s": _number(row.bandwidth() / 1e9) if row.bytes else "-",
        "of B": f"{100 * row.bandwidth() / copy_bandwidth:.0f} %" if row.bytes and copy_bandwidth else "-",
        "TFLOP/s": _number(row.flops_per_second() / 1e12) if row.flops else "-",
        "peak memory": _peak(row) if row.peak and not row.flops else "-",
        "memory beside gradients": _beside_gradients(row) if row.peak and row.flops else "-",
    }
    for peer in peers:
        speedup = row.speedup(peer)
        cells[f"over {peer}"] = "-" if speedup is None else f"{speedup:.2f}x"
    cells["goals"] = ", ".join(verdicts).replace("MISSED", "**MISSED**") or "-"
    return cells


def _counted(row: Row) -> str:
    others = f" + {row.other_bytes}" if row.other_bytes else ""
    return f"{row.passes} x {row.elements} x {row.element_bytes}{others} = {_size(row.bytes)}"


def _peak(row: Row) -> str:
    return f"{row.peak[OURS] / 1e6:.3g} MB = {row.memory():.2f}x input"


def _beside_gradients(row: Row) -> str:
    """Of every provider: it is what a linear loss is for."""
    names = [OURS, *(name for name in PEERS if name in row.peak)]
    return ", ".join(f"{name} {row.beside_gradients(name) / 1e6:.0f}" for name in names) + " MB"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e3:.3g} kB"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
