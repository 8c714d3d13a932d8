"""Trains one task with one side's loss, and measures it."""

import resource
import statistics
import sys
import time

import torch
import torch._dynamo  # noqa: F401  imported by an optimizer's first step: here, once for all processes
from tasks import make
from tqdm import tqdm


def resident_megabytes() -> float:
    """The largest resident set so far; ru_maxrss counts kilobytes on Linux and bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)


def main(name: str, side: str, ids_path: str, steps: int) -> dict[str, object]:
    torch.manual_seed(0)
    task = make(name, ids_path)
    criterion = task.criteria[side]()
    before_loss = task.model[:-1] if side == "linear" else task.model  # type: ignore[index]
    optimizer = torch.optim.Adam(task.model.parameters(), task.learning_rate)
    batches = torch.Generator().manual_seed(1)
    before = resident_megabytes()
    curve, step_times, loss_times = [], [], []
    for _ in tqdm(range(min(steps, task.steps)), desc=f"{task.name:20s} {side:9s}", mininterval=0.5):
        rows = torch.randint(len(task.inputs), (task.batch,), generator=batches)
        x, y = task.inputs[rows], task.targets[rows]
        start = time.perf_counter()
        optimizer.zero_grad()
        outputs = before_loss(x)
        # Cutting the graph at the outputs times the loss's own forward and backward; the mathematics is the same.
        cut = outputs.detach().requires_grad_()
        loss_start = time.perf_counter()
        loss = criterion(cut, y)
        loss.backward()
        loss_times.append(time.perf_counter() - loss_start)
        outputs.backward(cut.grad)
        optimizer.step()
        step_times.append(time.perf_counter() - start)
        curve.append(loss.item())
    peak = resident_megabytes() - before
    x, y = task.held_out
    with torch.no_grad():
        metric = task.evaluate(task.model(x), y)
    return {
        "task": task.name,
        "metric_name": task.metric,
        "metric": metric,
        "curve": curve,
        "step_ms": statistics.median(step_times) * 1e3,
        "loss_ms": statistics.median(loss_times) * 1e3,
        "peak_mb": peak,
    }
