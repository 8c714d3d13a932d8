"""A CPU's figures on the terminal: a table for each family, at most 100 columns wide, line by line as they come."""

from collections.abc import Iterator

from .results import EAGER, OURS, Row

WIDTH = 100
# The heads of two lines, and how wide a column is. Cases are left-aligned.
COLUMNS = (
    ("", "case", 45),
    ("", "threads", 7),
    ("", "time", 7),
    ("over", "eager", 6),
    ("over", "compile", 7),
    ("of a", "copy", 5),
    ("peak MB,", "ours / eager", 15),
)
LEGEND = """Forward + backward of the mean. "over": how many times as fast as eager torch and as torch.compile,
the median of the ratios of rounds in turn. "of a copy": bytes a second, for input and target read
and gradient written, over those of a copy of the input. "peak MB": what a step allocates; of a
linear loss, beside the gradients."""
BUSY = "*: other processes held a core throughout; such times mean little. Try again, or fewer --threads."


def head(family: str) -> str:
    first = _aligned([upper for upper, _, _ in COLUMNS])
    second = _aligned([lower for _, lower, _ in COLUMNS])
    return f"\n{family}\n{first}\n{second}\n{'-' * len(second)}"


def lines(row: Row, threads: int) -> Iterator[str]:
    """A line of the table, before it a name that its column cannot hold, and after it others than eager and compile."""
    long = len(row.case) > COLUMNS[0][2]
    if long:
        yield row.case
    over_eager, over_compile, of_copy = row.speedup(EAGER), row.speedup("compile"), row.share_of_copy()
    yield _aligned(
        [
            "" if long else row.case,
            str(threads),
            duration(row.seconds[OURS]) + "*" * (not row.quiet),
            _times(over_eager),
            _times(over_compile),
            "" if of_copy is None else f"{100 * of_copy:.0f} %",
            memory(row),
        ]
    )
    others = {name: row.speedup(name) for name in row.seconds if name not in (OURS, EAGER, "compile")}
    said = [f"{_times(ratio)} {name}" for name, ratio in others.items()]
    said += [f"{name}: {why}" for name, why in row.missing.items()]
    if said:
        yield ("    " + ", ".join(said))[:WIDTH]


def whole(rows: list[tuple[Row, int]]) -> str:
    """All tables at once, of rows and the threads that they had."""
    text = []
    for family in dict.fromkeys(row.family for row, _ in rows):
        text.append(head(family))
        text += [line for row, threads in rows if row.family == family for line in lines(row, threads)]
    return "\n".join([*text, *ending([row for row, _ in rows])])


def ending(rows: list[Row]) -> Iterator[str]:
    """What the tables mean, and the goals that were missed."""
    yield ""
    yield LEGEND
    if not all(row.quiet for row in rows):
        yield BUSY
    verdicts = [verdict for row in rows for _, verdict in row.verdicts(None)]
    counted = [f"{verdicts.count(verdict)} {verdict.lower()}" for verdict in dict.fromkeys(verdicts)]
    yield "goals: " + ", ".join(counted or ["none"])
    yield from (f"  {goal}" for row in rows for goal in row.unmet(None) if "MISSED" in goal)


def memory(row: Row) -> str:
    """Of a linear loss, beyond the gradients too; nothing below 0.1 MB, where the cost of a call is what counts."""
    if not row.peak or row.peak[EAGER] < 1e5:
        return ""
    ours, eager = (row.beside_gradients(name) if row.flops else row.peak[name] for name in (OURS, EAGER))
    return f"{_three(ours / 1e6)} / {_three(eager / 1e6)}"


def duration(seconds: float) -> str:
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{_three(seconds * factor)} {unit}"
    return f"{_three(seconds)} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{_three(ratio)}x"


def _three(value: float) -> str:
    """Three digits, or two behind the point, or all before it."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _aligned(cells: list[str]) -> str:
    first, *others = ((cell, width) for cell, (*_, width) in zip(cells, COLUMNS, strict=True))
    return " ".join([f"{first[0]:{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]).rstrip()
