"""The five pictures, each drawn from the newest results of a CPU."""

from collections.abc import Iterable

from ..results import EAGER, OURS, Row
from ..terminal import duration
from . import words
from .committed import BY_SIZE, BY_VOCABULARY, Committed, family
from .svg import WIDTH, Picture, Scale, line_kind

# Shapes of each kind, the README's six among them.
SHAPES = [
    "cross_entropy-fp32-512x32000",
    "cross_entropy-fp32-64x128256",
    "cross_entropy-fp32-2048x1000",
    "cross_entropy-fp32-4x10",
    "cross_entropy-bf16-512x32000",
    "cross_entropy-fp32-4x21x256x256",
    "soft_cross_entropy-fp32-512x32000",
    "focal-fp32-2048x1000",
    "sigmoid_focal_indexed-fp32-100000x80",
    "kl_divergence-fp32-512x32000",
    "huber-fp32-4194304",
    "bce_with_logits-fp32-4194304",
    "sigmoid_focal-bf16-4194304",
]
SIDES = {EAGER: "torch eager", OURS: "fusedloss"}
TOP = 96  # below title, machine and legend


def legend_of_lines(picture: Picture, names: Iterable[tuple[str, str, bool]]) -> None:
    """A side, its words, and whether its line is dashed."""
    x = 16.0
    for side, told, dashed in names:
        picture.rule(x, 68, x + 36, 68, line_kind(side, dashed))
        picture.marker(x + 18, 68, side)
        picture.text(x + 43, 73, told)
        x += 43 + 7 * len(told) + 16


def legend_of_bars(picture: Picture, names: Iterable[tuple[str, str]]) -> None:
    x = 16.0
    for kind, told in names:
        picture.bar(x, x + 14, 61, 14, kind)
        picture.text(x + 21, 73, told)
        x += 21 + 7 * len(told) + 16


def speed(committed: Committed) -> str:
    """Bars from 1 to how many times as fast as eager and as torch.compile."""
    run, left, row_height = committed.cpu, 304, 36
    rows = {row.case: row for row in run.rows if row.family not in (BY_SIZE, BY_VOCABULARY)}
    shown = [rows[name] for name in SHAPES if name in rows]
    ratios = [(row, [(name, row.speedup(name)) for name in (EAGER, "compile")]) for row in shown]
    found = [ratio for _, both in ratios for _, ratio in both if ratio is not None]
    bottom = TOP + 8 + row_height * len(shown)
    picture = Picture("Times as fast, forward and backward, by shape", words.where(run.machine), bottom + 34)
    legend_of_bars(picture, [(EAGER, "over torch eager"), ("compile", "over torch.compile")])
    place = Scale(min(1.0, *found), max(found), left, WIDTH - 60, log=True)
    for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if place.low <= tick <= place.high:
            picture.rule(place(tick), TOP - 4, place(tick), bottom, "axis" if tick == 1 else "rule")
            picture.text(place(tick), bottom + 20, f"{tick:g}x", "soft", "middle")
    for i, (row, both) in enumerate(ratios):
        y = TOP + 4 + row_height * i
        picture.text(left - 12, y + 19, words.case(row.case), anchor="end")
        for j, (name, ratio) in enumerate(both):
            if ratio is not None:
                picture.bar(place(1), place(ratio), y + 14 * j, 12, name)
                picture.text(max(place(ratio), place(1)) + 6, y + 14 * j + 11, words.ratio(ratio), "soft")
    return str(picture)


def bandwidth(committed: Committed) -> str:
    """The share of a copy's bandwidth that forward and backward of cross-entropy reach, by the length of a row."""
    run = committed.cpu
    rows = family(run, BY_VOCABULARY)
    ours = {row.case: row.share_of_copy() or 0.0 for row in rows}
    shares = {
        side: {row.case: 100 * ours[row.case] * row.seconds[OURS] / row.seconds[side] for row in rows} for side in SIDES
    }
    title = "Cross-entropy: share of the bandwidth of a copy, by classes of a row"
    return by_vocabulary(title, words.where(run.machine), rows, shares, "%", 100)


def memory(committed: Committed) -> str:
    """The peak of what a step of cross-entropy allocates, by the length of a row: about as many logits in each."""
    run = committed.cpu
    rows = family(run, BY_VOCABULARY)
    peaks = {side: {row.case: row.peak[side] / 1e6 for row in rows} for side in SIDES}
    logits = max(row.elements for row in rows) / 1e6
    title = f"Cross-entropy: peak memory beside {logits:.0f}M logits, by classes of a row"
    return by_vocabulary(title, words.where(run.machine), rows, peaks, "MB", 1)


def by_vocabulary(
    title: str, told: str, rows: list[Row], values: dict[str, dict[str, float]], unit: str, least: float
) -> str:
    """Lines of both sides in both dtypes over the number of classes."""
    bottom, left = 370, 70
    picture = Picture(title, told, bottom + 60)
    dtypes = list(dict.fromkeys(words.parts(row.case)["dtype"] for row in rows))
    lines = [(side, dtype) for dtype in dtypes for side in SIDES]
    legend_of_lines(picture, [(side, f"{SIDES[side]}, {dtype}", dtype == "bf16") for side, dtype in lines])
    classes = [words.shape(row.case)[1] for row in rows]
    across = Scale(min(classes), max(classes), left + 16, WIDTH - 30, log=True)
    most = max(least, *(value for side in SIDES for value in values[side].values()))
    step = next(each for each in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500) if most / each <= 6)
    up = Scale(0, step * -(-most // step), bottom, TOP)
    for i in range(int(up.high / step) + 1):
        picture.rule(left, up(i * step), WIDTH - 16, up(i * step), "axis" if i == 0 or i * step == least else "rule")
        picture.text(left - 8, up(i * step) + 5, f"{i * step:g} {unit}", "soft", "end")
    for decade in range(1, 7):
        if min(classes) <= 10**decade <= max(classes):
            picture.rule(across(10**decade), bottom, across(10**decade), bottom + 6, "axis")
            picture.text(across(10**decade), bottom + 22, f"{10**decade:,}", "soft", "middle")
    picture.text((left + WIDTH) / 2, bottom + 44, "classes", "soft", "middle")
    for side, dtype in lines:
        of_line = sorted((words.shape(row.case)[1], values[side][row.case]) for row in rows if dtype in row.case)
        picture.line([(across(x), up(y)) for x, y in of_line], side, dtype == "bf16")
    return str(picture)


def crossover(committed: Committed) -> str:
    """Seconds of a call over the number of elements or rows, a panel for each loss."""
    run, bottom = committed.cpu, 360
    rows = family(run, BY_SIZE)
    picture = Picture("Time of a call, forward and backward, by size", words.where(run.machine), bottom + 60)
    legend_of_lines(picture, [(side, told, False) for side, told in SIDES.items()])
    times = [row.seconds[side] for row in rows for side in SIDES]
    up = Scale(10.0 ** decade_below(min(times)), max(times) * 1.2, bottom, TOP, log=True)
    losses = list(dict.fromkeys(words.parts(row.case)["loss"] for row in rows))
    width = (WIDTH - 70) / len(losses)
    for panel, loss in enumerate(losses):
        of_panel = sorted((row for row in rows if words.parts(row.case)["loss"] == loss), key=first_size)
        left = 66 + panel * width
        right = left + width - 34
        across = Scale(first_size(of_panel[0]), first_size(of_panel[-1]), left + 10, right - 10, log=True)
        for decade in range(-6, 1):
            if up.low <= 10.0**decade <= up.high:
                picture.rule(left, up(10.0**decade), right, up(10.0**decade))
                if panel == 0:
                    picture.text(left - 8, up(10.0**decade) + 5, plain_seconds(decade), "soft", "end")
        picture.rule(left, bottom, right, bottom, "axis")
        for decade in range(0, 8, 2):
            if across.low <= 10**decade <= across.high:
                picture.rule(across(10**decade), bottom, across(10**decade), bottom + 6, "axis")
                picture.text(across(10**decade), bottom + 22, f"{10**decade:,}", "soft", "middle")
        sizes = words.shape(of_panel[0].case)
        counted = f"rows of {sizes[1]} classes" if len(sizes) > 1 else "elements"
        picture.text((left + right) / 2, bottom + 44, f"{words.LOSSES[loss]}, {counted}", "soft", "middle")
        for side in SIDES:
            picture.line([(across(first_size(row)), up(row.seconds[side])) for row in of_panel], side)
    return str(picture)


def first_size(row: Row) -> int:
    return words.shape(row.case)[0]


def decade_below(value: float) -> int:
    return next(decade for decade in range(1, -10, -1) if 10.0**decade <= value)


def plain_seconds(decade: int) -> str:
    return {0: "1 s", -1: "100 ms", -2: "10 ms", -3: "1 ms", -4: "100 us", -5: "10 us", -6: "1 us"}[decade]


def step(committed: Committed) -> str:
    """A step of each of the demo's models: the loss, and the rest. A linear loss takes the last layer with it."""
    measured, left, row_height = committed.of("demo"), 130, 26
    sides = [task["sides"] for task in measured.figures]
    height = TOP + sum(34 + row_height * len(each) for each in sides) + 14
    picture = Picture("A training step of the demo's models", words.where(measured.machine), height)
    named = [("fused", "the loss, with the last layer where it is linear"), ("rest", "the rest of the step")]
    legend_of_bars(picture, named)
    y = TOP
    for task, runs in zip(measured.figures, sides, strict=True):
        longest = max(run["step_ms"] for run in runs.values())
        place = Scale(0, longest, left, WIDTH - 190)
        picture.text(16, y + 14, task["task"], "bold")
        y += 24
        for side, run in runs.items():
            picture.text(left - 12, y + 14, side, anchor="end")
            picture.bar(place(0), place(run["loss_ms"]), y, 18, "fused")
            picture.bar(place(run["loss_ms"]), place(run["step_ms"]), y, 18, "rest")
            told = f"{duration(run['step_ms'] / 1e3)}, the loss {duration(run['loss_ms'] / 1e3)}"
            picture.text(place(run["step_ms"]) + 8, y + 14, told, "soft")
            y += row_height
        y += 10
    return str(picture)
