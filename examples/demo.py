"""Trains three models from the same seed with torch.nn's losses and with fusedloss, and compares the runs.

The first is trained a third time with the linear loss, which takes the place of the model's last layer and its loss.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import train
from corpus import token_ids
from figures import add_output, write
from tasks import VOCABULARY

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TASKS = ["next_token", "digits", "diabetes"]
SIDES = {task: ["torch", "fusedloss"] for task in TASKS}
SIDES["next_token"].append("linear")
LARGEST_DIFFERENCE = 1e-4

Run = dict[str, Any]


FOR_A_RATIO = 50  # steps: medians of fewer say little
# Forked, a process has torch and scikit-learn imported already: six seconds less for each.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def trained(task: str, side: str, ids_path: str, steps: int) -> Run:
    """A training in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, PROCESSES) as process:
        return process.submit(train.main, task, side, ids_path, steps).result()


def difference(runs: dict[str, Run], side: str) -> float:
    """The largest relative difference between the loss curve of a side and torch's."""
    torch_curve, curve = np.array(runs["torch"]["curve"]), np.array(runs[side]["curve"])
    return float(np.max(np.abs(torch_curve - curve) / np.abs(torch_curve)))


def print_table(results: list[dict[str, Run]]) -> None:
    heads = ["losses of", "metric", "curves differ", "step ms", "loss ms", "peak MB", "step", "loss"]
    form = "{:12s} {:>9s} {:>14s} {:>9s} {:>9s} {:>8s} {:>7s} {:>7s}"
    print("\n" + form.format(*heads))
    for runs in results:
        base = runs["torch"]
        print(f"{base['task']}: {base['metric_name']}")
        for side, run in runs.items():
            fused, enough = side != "torch", len(run["curve"]) >= FOR_A_RATIO
            print(
                form.format(
                    f"  {side}",
                    f"{run['metric']:.4g}",
                    f"{difference(runs, side):.1e}" if fused else "",
                    f"{run['step_ms']:.3f}",
                    f"{run['loss_ms']:.3f}",
                    f"{run['peak_mb']:.0f}",
                    f"{base['step_ms'] / run['step_ms']:.2f}x" if fused and enough else "",
                    f"{base['loss_ms'] / run['loss_ms']:.2f}x" if side == "fusedloss" and enough else "",
                )
            )
    print(
        "\nstep and loss (its forward and backward): medians, and the speed-up"
        "\npeak: memory above that before training"
        "\nlinear: fusedloss.LinearCrossEntropyLoss, whose loss ms are those of the model's last layer too"
    )


def figures(results: list[dict[str, Run]]) -> list[dict[str, Any]]:
    """What the table says, for a file."""
    names = ("metric", "step_ms", "loss_ms", "peak_mb")
    return [
        {
            "task": runs["torch"]["task"],
            "metric": runs["torch"]["metric_name"],
            "sides": {
                side: {**{name: run[name] for name in names}, "curves differ": difference(runs, side)}
                for side, run in runs.items()
            },
        }
        for runs in results
    ]


def draw(results: list[dict[str, Run]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), layout="constrained")
    for axis, runs in zip(axes, results, strict=True):
        faster = runs["torch"]["loss_ms"] / runs["fusedloss"]["loss_ms"]
        axis.plot(runs["torch"]["curve"], linewidth=3, color="0.7", label="torch.nn")
        axis.plot(runs["fusedloss"]["curve"], linewidth=1, linestyle="--", color="tab:red", label="fusedloss")
        axis.set(title=f"{runs['torch']['task']}: loss {faster:.1f}x as fast", xlabel="step", ylabel="training loss")
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    parser.add_argument("--quick", action="store_true", help="a few steps of each task")
    add_output(parser)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ids_path = str(Path(folder) / "ids.npy")
        print("tokenising the standard library", file=sys.stderr)
        np.save(ids_path, token_ids(VOCABULARY, 40_000 if options.quick else 1_000_000))
        steps = 5 if options.quick else 1_000_000
        results = [{side: trained(task, side, ids_path, steps) for side in SIDES[task]} for task in TASKS]
    print_table(results)
    draw(results, options.picture)
    write(options.output, figures(results))
    print(f"curves: {options.picture}; {time.perf_counter() - started:.0f} s")
    off = [
        f"{run['task']} ({side})"
        for runs in results
        for side, run in runs.items()
        if not difference(runs, side) <= LARGEST_DIFFERENCE
    ]
    if off:
        print(f"the loss curves differ by more than {LARGEST_DIFFERENCE} relative: {', '.join(off)}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
