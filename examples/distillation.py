"""Distillation: a small student learns the next token from a larger teacher, with plain PyTorch's recipe and with ours.

The recipe is that of Hinton et al.: the divergence of softened distributions, and the cross-entropy of the labels. Both
students start from the same seed and see the same batches, each in a process of its own, so that its peak memory is
its own.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import token_ids
from figures import add_output, write
from torch import Tensor, nn
from train import resident_megabytes

import fusedloss

VOCABULARY, CONTEXT, BATCH = 8_000, 8, 256
TEACHER, STUDENT = 64, 16  # features of a hidden state
TEMPERATURE, ALPHA = 2.0, 0.7
# Forked, a process has imported torch already. None of them has started threads by then.
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)


class PlainDistillationLoss(nn.Module):
    """The recipe as it is usually written."""

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / TEMPERATURE, 1)
        log_p = F.log_softmax(teacher / TEMPERATURE, 1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * F.cross_entropy(student, labels)


SIDES: dict[str, Callable[[], nn.Module]] = {
    "torch": PlainDistillationLoss,
    "fusedloss": lambda: fusedloss.DistillationLoss(TEMPERATURE, ALPHA),
}


def network(features: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(VOCABULARY, features), nn.Flatten(), nn.Linear(features * CONTEXT, features), nn.Tanh(),
        nn.Linear(features, VOCABULARY),
    )  # fmt: skip


def windows(ids: Path) -> tuple[Tensor, Tensor]:
    """Tokens, and the token that follows them; the last BATCH are held out."""
    rows = torch.from_numpy(np.load(ids)).unfold(0, CONTEXT + 1, 1)
    return rows[:, :CONTEXT], rows[:, CONTEXT]


def batches(ids: Path, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    tokens, labels = windows(ids)
    order = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(labels) - BATCH, (BATCH,), generator=order)
        yield tokens[rows], labels[rows]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Path) -> float:
    tokens, labels = windows(ids)
    return float(F.cross_entropy(model(tokens[-BATCH:]), labels[-BATCH:]).exp())


def train_teacher(ids: Path, weights: Path, steps: int) -> float:
    torch.manual_seed(0)
    model, criterion = network(TEACHER), fusedloss.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for tokens, labels in batches(ids, steps):
        optimizer.zero_grad()
        criterion(model(tokens), labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), weights)
    return perplexity(model, ids)


def train_student(side: str, ids: Path, weights: Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    student, criterion = network(STUDENT), SIDES[side]()
    teacher = network(TEACHER).requires_grad_(False)
    teacher.load_state_dict(torch.load(weights))
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    before = resident_megabytes()
    curve, step_times, loss_times = [], [], []
    for tokens, labels in batches(ids, steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        soft_targets, logits = teacher(tokens), student(tokens)
        # Cutting the graph at the logits times the loss's own forward and backward; the mathematics is the same.
        cut = logits.detach().requires_grad_()
        loss_start = time.perf_counter()
        loss = criterion(cut, soft_targets, labels)
        loss.backward()
        loss_times.append(time.perf_counter() - loss_start)
        logits.backward(cut.grad)
        optimizer.step()
        step_times.append(time.perf_counter() - start)
        curve.append(loss.item())
    return {
        "curve": curve,
        "step": statistics.median(step_times) * 1e3,
        "loss": statistics.median(loss_times) * 1e3,
        "peak": resident_megabytes() - before,
        "perplexity": perplexity(student, ids),
    }


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, PROCESSES) as process:
        return process.submit(function, *arguments).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    add_output(parser)
    options = parser.parse_args()
    steps = options.steps
    with tempfile.TemporaryDirectory() as folder:
        ids, weights = Path(folder) / "ids.npy", Path(folder) / "teacher.pt"
        np.save(ids, token_ids(VOCABULARY, 100_000))
        of_teacher = in_a_process(train_teacher, ids, weights, steps)
        runs = {side: in_a_process(train_student, side, ids, weights, steps) for side in SIDES}
    base = runs["torch"]
    heads = ["loss of", "step ms", "loss ms", "peak MB", "perplexity", "curve differs"]
    print("".join(f"{head:>15s}" for head in heads))
    for side, run in runs.items():
        run["differs"] = differs = max(abs(a - b) / b for a, b in zip(run["curve"], base["curve"], strict=True))
        numbers = [side, f"{run['step']:.1f}", f"{run['loss']:.1f}", f"{run['peak']:.0f}"]
        print("".join(f"{number:>15s}" for number in [*numbers, f"{run['perplexity']:.0f}", f"{differs:.1e}"]))
    names = ("step", "loss", "peak", "perplexity", "differs")
    sides = {side: {name: run[name] for name in names} for side, run in runs.items()}
    write(options.output, {"vocabulary": VOCABULARY, "rows": BATCH, "sides": sides})
    first, *_, last = base["curve"]
    print(f"\nloss from {first:.3f} to {last:.3f}; the teacher's perplexity is {of_teacher:.0f}")
    logits, labels = torch.zeros(4, VOCABULARY), torch.zeros(4, dtype=torch.long)
    print(f"divergence: {fusedloss.explain(fusedloss.functional.kl_divergence, logits, logits)}")
    print(f"labels: {fusedloss.explain(fusedloss.CrossEntropyLoss(), logits, labels)}")
    return 0 if differs <= 1e-4 and last < first else 1


if __name__ == "__main__":
    sys.exit(main())
