"""The tables of what single programs have measured: examples, and a subject each of ``benchmarks/``."""

from typing import Any

from ..results import EAGER, OURS
from ..terminal import duration
from .committed import Committed
from .words import case, megabytes, ratio, table, where


def trainer(committed: Committed) -> str:
    """examples/transformers_trainer.py"""
    measured = committed.of("transformers-trainer")
    figures, sides = measured.figures, measured.figures["sides"]
    names = {"transformers": "as it is", "patched": "patched", "linear": "`LinearLoss`"}
    lines = [
        [
            names[side],
            f"{run['step']:.1f}",
            f"{run['loss']:.1f}",
            f"{100 * run['loss'] / run['step']:.0f} %",
            f"{run['peak']:.0f}",
            ratio(sides["transformers"]["step"] / run["step"]),
        ]
        for side, run in sides.items()
    ]
    sizes = f"a vocabulary of {figures['vocabulary']:,}, {figures['tokens']} tokens, {figures['features']} features"
    head = ["losses", "step, ms", "loss, ms", "of the step", "peak, MB", "speed of the step"]
    return f"With {sizes} ({where(measured.machine)}):\n\n{table(head, lines)}"


def distillation(committed: Committed) -> str:
    """examples/distillation.py"""
    measured = committed.of("distillation")
    sides = measured.figures["sides"]
    lines = [
        [
            side,
            f"{run['step']:.1f}",
            f"{run['loss']:.1f}",
            f"{run['peak']:.0f}",
            ratio(sides["torch"]["loss"] / run["loss"]),
        ]
        for side, run in sides.items()
    ]
    sizes = f"{measured.figures['rows']} rows of {measured.figures['vocabulary']:,} classes"
    head = ["loss of", "step, ms", "loss, ms", "peak, MB", "speed of the loss"]
    return f"Of {sizes} ({where(measured.machine)}):\n\n{table(head, lines)}"


def demo(committed: Committed) -> str:
    """examples/demo.py"""
    measured = committed.of("demo")
    lines = []
    for task in measured.figures:
        base = task["sides"]["torch"]
        for side, run in task["sides"].items():
            lines.append(
                [
                    task["task"],
                    side,
                    f"{run['step_ms']:.2f}",
                    f"{run['loss_ms']:.2f}",
                    f"{run['peak_mb']:.0f}",
                    ratio(base["step_ms"] / run["step_ms"]),
                    f"{run['metric']:.4g} ({task['metric']})",
                ]
            )
    head = ["model", "losses of", "step, ms", "loss, ms", "peak, MB", "speed of the step", "held out"]
    return f"{where(measured.machine)}:\n\n{table(head, lines)}"


def adoption(committed: Committed) -> str:
    """benchmarks/adoption.py"""
    measured = committed.of("adoption")
    sides = list(next(iter(measured.figures.values())))
    lines = [[name, *(duration(each[side]) for side in sides)] for name, each in measured.figures.items()]
    return f"{table(['forward, without a gradient', *sides], lines)}\n\n({where(measured.machine)})"


def sharded(committed: Committed) -> str:
    """benchmarks/sharded.py"""
    measured = committed.of("sharded")
    figures = measured.figures
    lines = [[f"`{side}`", f"{run['cpu_ms']:.1f}", megabytes(run["peak"])] for side, run in figures["sides"].items()]
    head = ["a step of a rank", "CPU time, ms", "MB beyond the logits"]
    sizes = f"({figures['rows']}, {figures['classes']}) in float32 over {figures['ranks']} processes of one thread"
    return f"{sizes}, torch {measured.machine['torch']}, {measured.machine['date']}:\n\n{table(head, lines)}"


def sharded_scale(committed: Committed) -> str:
    """benchmarks/sharded_scale.py, of some numbers of ranks."""
    figures = committed.of("sharded-scale").figures
    shown = [line for line in figures["lines"] if line[0] in ("8", "64", "512")]
    return f"For {figures['rows']} rows of {figures['classes']} classes:\n\n{table(figures['head'], shown)}"


def linear_memory(committed: Committed) -> str:
    """benchmarks/linear_memory.py"""
    measured = committed.of("linear-memory")
    lines = [
        [case(name), *(megabytes(peak[side]) for side in (EAGER, OURS))]
        for name, peak in measured.figures["peak"].items()
    ]
    return f"{where(measured.machine)}:\n\n{table(['case', 'eager, MB', 'fusedloss, MB'], lines)}"


def linear_digits(committed: Committed) -> str:
    """benchmarks/linear_memory.py"""
    measured = committed.of("linear-memory")
    lines = [
        [case(name), part, *(f"{off[side][i]:.1e}" for side in (EAGER, OURS))]
        for name, off in measured.figures["digits"].items()
        for i, part in enumerate(("input", "head"))
    ]
    return table(["case", "gradient of the", "eager", "fusedloss"], lines)


def pages(committed: Committed) -> str:
    """benchmarks/pages.py"""
    measured = committed.of("pages")
    lines = [_setting(name, each) for name, each in measured.figures.items()]
    head = ["setting", "variables", "copy into new memory", "faults", "into warm memory", "cross-entropy", "faults"]
    return f"{where(measured.machine)}:\n\n{table(head, lines)}"


def _setting(name: str, each: dict[str, Any]) -> list[str]:
    if "skipped" in each:
        return [name, each["skipped"], "", "", "", "", ""]
    variables = " ".join(f"`{variable}={value}`" for variable, value in each["environment"].items())
    new, warm, step = each["figures"].values()
    times = [duration(one["seconds"]) for one in (new, warm, step)]
    return [name, variables, times[0], f"{new['faults']:.0f}", *times[1:], f"{step['faults']:.0f}"]
