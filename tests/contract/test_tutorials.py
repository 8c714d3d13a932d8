"""The numbers that tutorials on torch's losses print, and the formulas that they have readers write by hand."""

import math

import pytest
import torch
from marks import on_cpu_alone
from torch import Tensor, nn

import fusedloss

SAMPLE = [[1.0, 1.0], [1.0, 1.0]]
TARGET = [[0.0, 1.0], [2.0, 3.0]]
PREDICTIONS = [0.2, -0.5, 1.5, 0.7]
TRUTH = [1.0, 0.0, 1.0, 1.0]


def loss_and_grad(loss: nn.Module, sample: Tensor, target: Tensor) -> tuple[float, Tensor]:
    leaf = sample.clone().requires_grad_()
    value = loss(leaf, target)
    return value.item(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize(
    "name, printed",
    [
        ("L1Loss", 1.0),
        ("SmoothL1Loss", 0.625),
        ("MSELoss", 1.5),
        ("HuberLoss", 0.625),  # with its delta of 1 the smooth L1
        # A float target of the input's size is read as class probabilities: log 2 times (0 + 1) and (2 + 3), halved.
        ("CrossEntropyLoss", 2.0794),
    ],
)
def test_what_a_tutorial_prints(name, printed):
    sample, target = torch.tensor(SAMPLE), torch.tensor(TARGET)
    value, grad = loss_and_grad(getattr(fusedloss, name)(), sample, target)
    expected, expected_grad = loss_and_grad(getattr(nn, name)(), sample, target)
    assert round(value, 4) == round(expected, 4) == printed
    torch.testing.assert_close(grad, expected_grad)


@on_cpu_alone("on a GPU torch's device assert ends the process, and the loss of ours is NaN")
def test_the_binary_cross_entropy_of_what_are_no_probabilities():
    # Tutorials print -50, of a time when torch did not look at the targets. Today's raises for the 2 and the 3 in it,
    # and so do we.
    sample, target = torch.tensor(SAMPLE), torch.tensor(TARGET)
    for module in (fusedloss.BCELoss(), nn.BCELoss()):
        with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
            module(sample, target)
    # What the formula alone gives, with its logarithms of at least -100.
    logarithms = sample.log().clamp(min=-100), (1 - sample).log().clamp(min=-100)
    assert -(target * logarithms[0] + (1 - target) * logarithms[1]).mean() == -50
    # Of the row of probabilities both still give what they gave.
    row = slice(0, 1)
    assert fusedloss.BCELoss()(sample[row], target[row]) == nn.BCELoss()(sample[row], target[row]) == 50


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_huber_by_hand(reduction):
    def by_hand(predictions: Tensor, truth: Tensor, delta: float) -> Tensor:
        error = truth - predictions
        small = error.abs() <= delta
        return torch.where(small, error**2 / 2, delta * (error.abs() - delta / 2))

    # Differences of 0.2, 1.5 (the edge itself), 1.6 and 4, of either sign.
    truth = torch.tensor([1.0, 2.0, -1.0, 0.0, 3.0, 0.5])
    predictions = truth + torch.tensor([0.2, 1.5, -1.6, 4.0, -1.5, -4.0])
    losses = by_hand(predictions, truth, 1.5)
    expected = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    for module in (fusedloss.HuberLoss(reduction, delta=1.5), nn.HuberLoss(reduction, delta=1.5)):
        torch.testing.assert_close(module(predictions, truth), expected)


def test_binary_cross_entropy_by_hand():
    logits, truth = torch.tensor(PREDICTIONS), torch.tensor(TRUTH)
    probabilities = [1 / (1 + math.exp(-logit)) for logit in PREDICTIONS]
    by_hand = -sum(
        t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in zip(probabilities, TRUTH, strict=True)
    ) / len(TRUTH)
    for of in (fusedloss, nn):
        for value in (of.BCELoss()(logits.sigmoid(), truth), of.BCEWithLogitsLoss()(logits, truth)):
            assert value.item() == pytest.approx(by_hand, rel=1e-6)
    # The gradient of the mean by the logits is (p - t) / N.
    _, grad = loss_and_grad(fusedloss.BCEWithLogitsLoss(), logits, truth)
    expected = [(p - t) / len(TRUTH) for p, t in zip(probabilities, TRUTH, strict=True)]
    torch.testing.assert_close(grad, torch.tensor(expected))
