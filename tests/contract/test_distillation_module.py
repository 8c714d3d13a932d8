"""`DistillationLoss`: a share of the teacher and a share of the labels."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from distillation_calls import DIRECTIONS, pair, reduced, rows
from torch import nn

import fusedloss


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_parts_in_their_shares(weighted, alpha, direction, reduction):
    student, teacher = pair((2, 3, 8))
    labels = torch.tensor([[0, -100, 5], [7, 1, 2]], device=student.device)
    weight = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0]], device=student.device) if weighted else None
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    criterion = fusedloss.DistillationLoss(3.0, alpha, direction, beta=0.2, reduction=reduction)
    loss = criterion(student, teacher, labels, weight)
    kept = labels != -100
    soft = reduced(rows(exact, teacher, direction, temperature=3.0, beta=0.2), 8, reduction, kept, weight)
    hard = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(2, 3)
    expected = alpha * 9 * soft + (1 - alpha) * reduced(hard, 8, reduction, kept, weight)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    (exact_grad,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


def test_labels_may_be_left_out_where_they_have_no_share():
    student, teacher = pair((3, 8))
    torch.testing.assert_close(
        fusedloss.DistillationLoss(2.0, 1.0)(student, teacher).double(),
        4 * rows(student, teacher, "forward", temperature=2.0).mean(),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="labels may be left out only where alpha is 1, got alpha=0.5"):
        fusedloss.DistillationLoss()(student, teacher)
    with pytest.raises(ValueError, match=r"labels must be of the rows' shape \(3,\), got shape \(4,\)"):
        fusedloss.DistillationLoss(alpha=0.0)(student, teacher, torch.zeros(4, dtype=torch.int64))


def test_it_is_a_module_like_others():
    criterion = fusedloss.DistillationLoss(4.0, 0.7, "jsd", beta=0.1, ignore_index=3)
    assert isinstance(criterion, nn.Module) and criterion.state_dict() == {}
    shown = "DistillationLoss(temperature=4.0, alpha=0.7, direction='jsd', beta=0.1, teacher_is='logits', "
    assert repr(criterion) == shown + "ignore_index=3, reduction='batchmean')"
    student, teacher = pair((3, 8))
    labels = torch.tensor([3, 1, 2], device=student.device)
    again = pickle.loads(pickle.dumps(criterion))
    assert torch.equal(again(student, teacher, labels), criterion(student, teacher, labels))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"reduction": "mean"}, "reduction must be one of 'none', 'sum', 'batchmean', got 'mean'"),
    ],
)
def test_what_the_constructor_refuses(given, words):
    with pytest.raises(ValueError, match=words):
        fusedloss.DistillationLoss(**given)
