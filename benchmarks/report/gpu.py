"""The tables of the GPU runs, and what they come to."""

from ..results import EAGER, OURS, Results, Row
from ..table import render
from ..terminal import duration
from .committed import Committed, of_linear_losses
from .words import case, megabytes, parts, shape, spread, table

LARGEST = "cross_entropy-bf16-32768x50257"  # what the README names
PEERS = {"eager": "over eager", "compile": "over compile", "Liger": "over Liger", "QuACK": "over QuACK"}


def tables(committed: Committed) -> str:
    return render(committed.gpus)


def kind(row: Row) -> str:
    """The rows of a summary's line."""
    sizes, dtype = shape(row.case), parts(row.case)["dtype"]
    if not row.passes:
        return "the smallest calls"
    if len(sizes) == 1:
        return f"losses of elements, {dtype}"
    if len(sizes) > 2:
        return f"losses of pixels, {dtype}"
    return "rows of 4096 classes and more" if sizes[1] >= 4096 else f"rows of {sizes[1]} classes, {dtype}"


def summary(committed: Committed) -> str:
    """Of each kind of case the range of what was reached."""
    runs = [run for run in committed.gpus if not of_linear_losses(run)]
    return "\n\n".join(f"{run.machine['device']}, {run.machine['date']}:\n\n{of_run(run)}" for run in runs)


def of_run(run: Results) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        groups.setdefault((kind(row), row.timed), []).append(row)
    lines = []
    for (what, timed), rows in groups.items():
        shares = [100 * row.bandwidth() / run.copy_bandwidth for row in rows if row.bytes and run.copy_bandwidth]
        line = [what, timed, spread(shares, "{:.0f}", " %") if shares else ""]
        for name in PEERS:
            ratios = [ratio for row in rows if (ratio := row.speedup(name)) is not None]
            line.append(spread(ratios, unit="x") if ratios else "")
        lines.append(line)
    return table(["cases", "timed", "of B", *PEERS.values()], lines)


def sentence(committed: Committed) -> str:
    """For the README."""
    run = next(run for run in committed.gpus if any(row.case == LARGEST for row in run.rows))
    row = next(row for row in run.rows if row.case == LARGEST and row.timed == "forward + backward")
    times = [f"{duration(row.seconds[name])}" for name in (OURS, EAGER, "compile")]
    ours, eager, compiled = times
    return (
        f"On an {run.machine['device']}, value and gradient of {case(row.case)} take {ours}, eager torch {eager} and "
        f"`torch.compile` {compiled}; the [tables](docs/performance.md#results-on-a-gpu) have the other shapes."
    )


def linear(committed: Committed) -> str:
    """The linear losses of a GPU: time, and memory beside inputs and gradients."""
    names = {OURS: "fusedloss", "eager": "eager", "compile": "compile", "products": "products", "Liger": "Liger"}
    names |= {"QuACK": "QuACK", "CCE": "CCE"}
    text = []
    for run in (run for run in committed.gpus if of_linear_losses(run)):
        lines = []
        for row in run.rows:
            both = [
                f"{duration(row.seconds[name])}, {megabytes(row.beside_gradients(name))}" if name in row.seconds else ""
                for name in names
            ]
            lines.append([case(row.case), *both])
        text.append(f"{run.machine['device']}, {run.machine['date']}, times, and MB beside the gradients:")
        text.append(table(["case", *names.values()], lines))
    return "\n\n".join(text)
