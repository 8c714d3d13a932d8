"""The classification head of a detector: thousands of anchors, nearly all of them background.

The sigmoid focal loss takes the anchors' class indices. The number of classes stands for the background, -100 for an
anchor that is neither, and no one-hot is made. Divided by the number of objects, as in RetinaNet, it is compared with
plain binary cross-entropy over the same indices.
"""

import sys

import torch
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as L

ANCHORS, CLASSES, FEATURES = 20_000, 8, 16
BACKGROUND, NEITHER = CLASSES, -100


def anchors(prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and class indices: one anchor in 200 is an object, and some others are left out."""
    labels = torch.full((ANCHORS,), BACKGROUND)
    objects = torch.rand(ANCHORS) < 0.005
    labels[objects] = torch.randint(CLASSES, (int(objects.sum()),))
    features = torch.randn(ANCHORS, FEATURES) + torch.cat([prototypes, torch.zeros(1, FEATURES)])[labels]
    labels[(labels == BACKGROUND) & (torch.rand(ANCHORS) < 0.02)] = NEITHER
    return features, labels


def head() -> nn.Module:
    last = nn.Linear(64, CLASSES)
    nn.init.constant_(last.bias, -4.6)  # every anchor begins as background, with a probability of 0.01 of each class
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), last)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    objects = ((labels >= 0) & (labels < CLASSES)).sum().clamp(min=1)
    return L.sigmoid_focal_loss(logits, labels, reduction="mean", ignore_index=NEITHER, normalizer=objects)


def binary(logits: Tensor, labels: Tensor) -> Tensor:
    return L.binary_cross_entropy_with_logits(logits, labels, ignore_index=NEITHER)


def recall(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    """Of the objects, those among the anchors that the model is surest of, as many as there are objects."""
    objects = (labels >= 0) & (labels < CLASSES)
    with torch.no_grad():
        scores, found = model(features).max(1)
    scores[labels == NEITHER] = -torch.inf
    surest = scores.topk(int(objects.sum())).indices
    return float((found[surest] == labels[surest]).sum() / objects.sum())


def main() -> int:
    torch.manual_seed(0)
    prototypes = 1.6 * torch.randn(CLASSES, FEATURES)
    train, held_out = [anchors(prototypes) for _ in range(4)], anchors(prototypes)
    found = {}
    for name, criterion in {"binary cross-entropy": binary, "focal": focal}.items():
        torch.manual_seed(1)
        model = head()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(60):
            features, labels = train[step % len(train)]
            optimizer.zero_grad()
            loss = criterion(model(features), labels)
            loss.backward()
            optimizer.step()
        found[name] = recall(model, *held_out)
        print(f"{name:22s} last loss {loss.item():.4f}, recall at as many as there are objects {found[name]:.1%}")
    features, labels = held_out
    print(fusedloss.explain(L.sigmoid_focal_loss, model(features), labels, reduction="sum"))
    return 0 if found["focal"] > max(0.6, found["binary cross-entropy"]) else 1


if __name__ == "__main__":
    sys.exit(main())
