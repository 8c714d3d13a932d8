"""Rewrites the tables in docs/performance.md from benchmarks/results: ``python -m benchmarks.gpu.table``."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .results import OURS, Results, Row

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "No results yet."
PEERS = ("eager", "compile", "Liger", "QuACK", "flash-attn")
HEADER = ("case", "timed", "bytes counted", "time", "GB/s", "of B", *(f"over {peer}" for peer in PEERS), "goals")


def render(all_results: Iterable[Results]) -> str:
    text = "\n\n".join("\n".join(lines(results)) for results in all_results)
    return text or NOTHING


def lines(results: Results) -> Iterator[str]:
    machine = results.machine
    yield f"### {machine['device']}"
    yield ""
    yield f"B = {results.copy_bandwidth / 1e9:.0f} GB/s. " + ", ".join(
        f"{name} {value}" for name, value in machine.items() if name != "device"
    )
    yield ""
    yield _line(HEADER)
    yield _line(["---"] * len(HEADER))
    for row in results.rows:
        yield _line(_cells(row, results.copy_bandwidth))
    notes = [f"{case}: {why}" for case, why in results.skipped.items()]
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        for peer, why in row.missing.items():
            reasons.setdefault(f"{peer}: {why}", []).append(f"{row.case} {row.timed}")
    for reason, cases in reasons.items():
        notes.append(f"{reason} ({cases[0]}" + (f" and {len(cases) - 1} more)" if len(cases) > 1 else ")"))
    if notes:
        yield ""
        yield from (f"- {note}" for note in notes)


def _cells(row: Row, copy_bandwidth: float) -> Iterator[str]:
    yield row.case
    yield row.timed
    yield f"{row.passes} x {row.elements} x {row.element_bytes} = {row.bytes / 1e9:.2f} GB" if row.bytes else "-"
    yield _duration(row.seconds[OURS])
    yield f"{row.bandwidth() / 1e9:.0f}" if row.bytes else "-"
    yield f"{100 * row.bandwidth() / copy_bandwidth:.0f} %" if row.bytes else "-"
    for peer in PEERS:
        speedup = row.speedup(peer)
        yield "-" if speedup is None else f"{speedup:.2f}x"
    yield (
        ", ".join(
            f"{goal} **{verdict}**" if verdict == "MISSED" else f"{goal} {verdict}"
            for goal, verdict in row.verdicts(copy_bandwidth)
        )
        or "-"
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rewritten(document: str, table: str) -> str:
    """The document with the table between its markers, which must be there once, in order."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def update(document: Path = DOCUMENT, results: Path = RESULTS) -> None:
    table = render(Results.read(path) for path in sorted(results.glob("*.json")))
    document.write_text(rewritten(document.read_text(), table))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of .json files, one for each GPU")
    options = parser.parse_args(arguments)
    update(options.document, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
