"""Segmentation: a class for every pixel, with borders that nobody labelled.

Images of discs and squares are made here. The pixels around their edges have the label 255, as in the data sets that
people use, and `ignore_index` leaves them out of the loss and its mean. Discs cover few pixels, so they weigh more.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import fusedloss

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIZE, UNLABELLED, NAMES = 48, 255, ["background", "disc", "square"]


def scene() -> tuple[Tensor, Tensor]:
    """An image (1, H, W) and its labels (H, W)."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    labels = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for shape in (2, 1):
        dy, dx = y - torch.randint(10, SIZE - 10, ()), x - torch.randint(10, SIZE - 10, ())
        distance = torch.maximum(dy.abs(), dx.abs()) if shape == 2 else (dy**2 + dx**2).sqrt()
        radius = 9.0 if shape == 2 else 5.0
        labels[distance < radius + 1] = UNLABELLED
        labels[distance < radius - 1] = shape
    brightness = torch.tensor([0.1, 0.8, 0.5])
    image = brightness[torch.where(labels == UNLABELLED, 0, labels)] + 0.1 * torch.randn(SIZE, SIZE)
    return image[None], labels


def scenes(count: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(scene() for _ in range(count)), strict=True)
    return torch.stack(images), torch.stack(labels)


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, dilation in ((1, 1), (16, 2), (16, 4), (16, 8)):
        layers += [nn.Conv2d(channels, 16, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, len(NAMES), 1))


def overlaps(predicted: Tensor, labels: Tensor) -> list[float]:
    """Intersection over union of each class, over the labelled pixels."""
    kept = labels != UNLABELLED
    pairs = [((predicted == c) & kept, labels == c) for c in range(len(NAMES))]
    return [float((a & b).sum() / (a | b).sum()) for a, b in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("segmentation.png"))
    picture = parser.parse_args().picture
    torch.manual_seed(0)
    images, labels = scenes(64)
    model, criterion = network(), fusedloss.CrossEntropyLoss(torch.tensor([1.0, 4.0, 2.0]), ignore_index=UNLABELLED)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    print(fusedloss.explain(criterion, model(images[:8]), labels[:8]))
    for _ in range(20):
        for rows in torch.randperm(len(images)).split(8):
            optimizer.zero_grad()
            criterion(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    images, labels = scenes(16)
    with torch.no_grad():
        predicted = model(images).argmax(1)
    found = overlaps(predicted, labels)
    print(", ".join(f"{name} {share:.1%}" for name, share in zip(NAMES, found, strict=True)))
    figure, axes = plt.subplots(3, 4, figsize=(8, 6), layout="constrained")
    shown = torch.where(labels == UNLABELLED, -1, labels)
    for row, (title, of) in zip(
        axes, {"image": images[:, 0], "labels": shown, "predicted": predicted}.items(), strict=True
    ):
        row[0].set_ylabel(title)
        for axis, each in zip(row, of, strict=False):
            axis.imshow(each, **({"cmap": "gray"} if title == "image" else {"vmin": -1, "vmax": 2}))
            axis.set(xticks=[], yticks=[])
    figure.savefig(picture, dpi=100)
    print(f"images, labels (unlabelled pixels darkest) and predictions: {picture}")
    return 0 if min(found) > 0.6 else 1


if __name__ == "__main__":
    sys.exit(main())
