"""The three things trained: data, model, the loss of either side, and a metric on data held out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

import fusedloss

VOCABULARY = 32_000
CONTEXT = 8


class EverydayFocalLoss(nn.Module):
    """The softmax focal loss as it is usually written; torch has none."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        ce = F.cross_entropy(input, target, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


@dataclass
class Task:
    name: str
    metric: str
    model: nn.Module
    criteria: dict[str, Callable[[], nn.Module]]  # side -> loss
    inputs: Tensor
    targets: Tensor
    held_out: tuple[Tensor, Tensor]
    evaluate: Callable[[Tensor, Tensor], float]  # (outputs, targets)
    steps: int
    batch: int
    learning_rate: float


def next_token(ids: np.ndarray) -> Task:
    tokens = torch.from_numpy(ids)
    windows = tokens.unfold(0, CONTEXT + 1, 1)
    inputs, targets = windows[:, :CONTEXT], windows[:, CONTEXT]
    head = nn.Linear(32, VOCABULARY)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 32), nn.Tanh(), head)
    cut = len(inputs) - 2048
    return Task(
        "next token, V=32000",
        "perplexity",
        model,
        {
            "torch": nn.CrossEntropyLoss,
            "fusedloss": fusedloss.CrossEntropyLoss,
            # Takes the last layer with it: its inputs are the hidden states, and no logits are made.
            "linear": lambda: fusedloss.LinearCrossEntropyLoss.from_linear(head),
        },
        inputs[:cut],
        targets[:cut],
        (inputs[cut:], targets[cut:]),
        lambda outputs, y: float(F.cross_entropy(outputs, y).exp()),
        steps=250,
        batch=512,
        learning_rate=5e-3,
    )


def balanced_accuracy(outputs: Tensor, y: Tensor) -> float:
    right = outputs.argmax(1) == y
    return float(torch.stack([right[y == c].float().mean() for c in range(10)]).mean())


def digits() -> Task:
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    held_out = torch.arange(len(inputs)) % 4 == 0
    # Classes 5 to 9 keep a tenth of their samples, as a detector's rare classes do.
    kept = ~held_out & ((targets < 5) | (torch.arange(len(inputs)) % 10 == 1))
    return Task(
        "imbalanced digits",
        "balanced accuracy",
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)),
        {"torch": EverydayFocalLoss, "fusedloss": fusedloss.FocalLoss},
        inputs[kept],
        targets[kept],
        (inputs[held_out], targets[held_out]),
        balanced_accuracy,
        steps=600,
        batch=128,
        learning_rate=3e-3,
    )


def diabetes() -> Task:
    features, values = load_diabetes(return_X_y=True)
    inputs, targets = torch.tensor(features, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)[:, None]
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = (targets - targets.mean()) / targets.std()
    held_out = torch.arange(len(inputs)) % 4 == 0
    return Task(
        "diabetes",
        "mean absolute error",
        nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1)),
        {"torch": nn.HuberLoss, "fusedloss": fusedloss.HuberLoss},
        inputs[~held_out],
        targets[~held_out],
        (inputs[held_out], targets[held_out]),
        lambda outputs, y: float((outputs - y).abs().mean()),
        steps=600,
        batch=128,
        learning_rate=1e-3,
    )


def make(name: str, ids_path: str) -> Task:
    return {"next_token": lambda: next_token(np.load(ids_path)), "digits": digits, "diabetes": diabetes}[name]()
