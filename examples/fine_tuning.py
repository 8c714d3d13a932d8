"""Fine-tunes a small network: its head is replaced, its backbone stays frozen, and some classes are rare.

The backbone has learned the digits 0 to 4. Of the digits 5 to 9, which it has never seen, few images are left to train
on. Three losses and two optimizers are compared on held-out images, and a picture shows their curves and the confusion
matrix of the best.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import fusedloss

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

EPOCHS, BATCH, RARE = 30, 64, 12  # epochs, rows of a batch, images of each rare class
FEATURES = 128  # of an image, from the backbone
Data = tuple[Tensor, Tensor]


def data() -> tuple[Data, Data, Data]:
    """Images of the digits 0 to 4 for the backbone, imbalanced ones of all digits, and those held out."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.tensor(labels)
    third = torch.arange(len(targets)) % 3
    known = (third == 0) & (targets < 5)
    tune = third == 1
    for digit in range(5, 10):
        tune[(tune & (targets == digit)).nonzero()[RARE:]] = False
    return tuple((images[rows], targets[rows]) for rows in (known, tune, third == 2))  # type: ignore[return-value]


def network(classes: int) -> nn.Sequential:
    backbone = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )  # fmt: skip
    return nn.Sequential(backbone, nn.Linear(FEATURES, classes))


def batches(images: Tensor, targets: Tensor) -> Iterator[Data]:
    for rows in torch.randperm(len(targets)).split(BATCH):
        yield images[rows], targets[rows]


def train(model: nn.Module, of: Data, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An epoch."""
    for images, targets in batches(*of):
        optimizer.zero_grad()
        criterion(model(images), targets).backward()
        optimizer.step()


def pretrained(known: Data) -> dict[str, Tensor]:
    """What a checkpoint of another task holds."""
    model = network(5)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10):
        train(model, known, fusedloss.CrossEntropyLoss(), optimizer)
    return model.state_dict()


def with_new_head(checkpoint: dict[str, Tensor]) -> nn.Sequential:
    model = network(5)
    model.load_state_dict(checkpoint)
    model.requires_grad_(False)
    model[1] = nn.Linear(FEATURES, 10)
    return model


@torch.no_grad()
def confusion(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Rows are the digits, columns what they were taken for; every row adds up to 1."""
    pairs = 10 * targets + model(images).argmax(1)
    counts = torch.bincount(pairs, minlength=100).view(10, 10)
    return counts / counts.sum(1, keepdim=True)


def draw(curves: dict[str, list[float]], best: str, matrix: Tensor, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, curve in curves.items():
        left.plot(range(1, len(curve) + 1), curve, "--" if name.endswith("SGD") else "-", label=name)
    left.set(xlabel="epoch", ylabel="balanced accuracy, held out", title="Only the head is trained")
    left.legend(fontsize="small")
    image = right.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for digit in range(10):
        for taken in range(10):
            share = float(matrix[digit, taken])
            if share >= 0.005:
                color = "white" if share > 0.5 else "black"
                right.text(taken, digit, f"{share:.0%}", ha="center", va="center", fontsize=7, color=color)
    right.set(xlabel="taken for", ylabel="digit", title=best, xticks=range(10), yticks=range(10))
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("fine_tuning.png"))
    picture = parser.parse_args().picture
    torch.manual_seed(0)
    known, tune, held_out = data()
    checkpoint = pretrained(known)
    counts = torch.bincount(tune[1])
    weight = counts.sum() / (10 * counts)
    criteria = {
        "cross-entropy": fusedloss.CrossEntropyLoss(),
        "weighted cross-entropy": fusedloss.CrossEntropyLoss(weight=weight),
        "weighted focal": fusedloss.FocalLoss(alpha=weight, gamma=2.0),
    }
    optimizers = {
        "SGD": lambda parameters: torch.optim.SGD(parameters, 0.03, momentum=0.9),
        "Adam": lambda parameters: torch.optim.Adam(parameters, 3e-3),
    }
    curves: dict[str, list[float]] = {}
    matrices: dict[str, Tensor] = {}
    with tqdm(total=len(criteria) * len(optimizers) * EPOCHS, unit="epoch") as bar:
        for of_optimizer, made in optimizers.items():
            for of_loss, criterion in criteria.items():
                name = f"{of_loss}, {of_optimizer}"
                bar.set_description(name)
                model = with_new_head(checkpoint)
                optimizer = made([each for each in model.parameters() if each.requires_grad])
                curves[name] = []
                for _ in range(EPOCHS):
                    train(model, tune, criterion, optimizer)
                    matrices[name] = confusion(model, *held_out)
                    curves[name].append(float(matrices[name].diagonal().mean()))
                    bar.update()
    for name, matrix in matrices.items():
        frequent, rare = matrix.diagonal()[:5].mean(), matrix.diagonal()[5:].mean()
        print(f"{name:28s} frequent digits {frequent:.1%}, rare digits {rare:.1%}")
    best = max(curves, key=lambda name: curves[name][-1])
    draw(curves, best, matrices[best], picture)
    print(f"best: {best}; curves and confusion matrix: {picture}")
    return 0 if best.startswith("weighted") and curves[best][-1] > 0.85 else 1


if __name__ == "__main__":
    sys.exit(main())
