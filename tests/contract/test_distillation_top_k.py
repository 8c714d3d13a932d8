"""A teacher of the k most probable classes of each row."""

import math

import pytest
import torch
from distillation_calls import DIRECTIONS, pair, reduced, rows
from marks import on_cpu_alone
from torch import Tensor
from torch.autograd import gradcheck

import fusedloss
import fusedloss.functional as L


def top_k(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    log_probs, indices = teacher.log_softmax(-1).topk(k, -1)
    return indices, log_probs


def compared(student: Tensor, indices: Tensor, log_p: Tensor, rest: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher over the classes that are compared, from whole rows."""
    log_q = (student.double() / temperature).log_softmax(-1)
    q, p = log_q.gather(-1, indices).exp(), log_p.double().exp()
    if rest == "renormalise":
        return (q / q.sum(-1, keepdim=True)).log(), (p / p.sum(-1, keepdim=True)).log()
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, indices, False)
    of_others = torch.where(others, log_q.exp(), 0.0).sum(-1, keepdim=True)
    left = (1 - p.sum(-1, keepdim=True)).clamp_min(0)
    return torch.cat([q, of_others], -1).log(), torch.cat([p, left], -1).log()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 200), (9,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_against_whole_rows(dtype, shape, rest, direction):
    student, teacher = pair(shape, dtype)
    indices, log_p = top_k(teacher.float(), 4)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=student.device)
    if labels.dim():
        labels.view(-1)[1] = -100
    loss, lse = L.kl_divergence(
        leaf, (indices, log_p), temperature=1.5, direction=direction, labels=labels, rest=rest, return_lse=True
    )
    of_student, of_teacher = compared(exact, indices, log_p, rest, 1.5)
    expected = reduced(rows(of_student, of_teacher, direction, "log_probs"), shape[-1], "batchmean", labels != -100)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    exact_lse = (exact.detach() / 1.5).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss, leaf)
    (exact_grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_classes_are_the_whole_teacher(direction):
    student, teacher = pair((5, 6), torch.float64)
    student.requires_grad_()
    expected = L.kl_divergence(student, teacher, direction=direction)
    (of_whole,) = torch.autograd.grad(expected, student)
    for rest in ("bucket", "renormalise"):
        loss = L.kl_divergence(student, top_k(teacher, 6), direction=direction, rest=rest)
        if rest == "renormalise" or direction == "forward":  # of the student's rounding a reverse bucket is a mass
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, student)[0], of_whole)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rest", ["bucket", "renormalise"])
def test_gradcheck_of_student_and_teacher(rest, direction):
    student, teacher = pair((3, 7), torch.float64)
    indices, log_p = top_k(teacher, 3)
    call = lambda s, t: L.kl_divergence(s, (indices, t), temperature=1.3, direction=direction, rest=rest)  # noqa: E731
    assert gradcheck(call, (student.requires_grad_(), log_p.detach().requires_grad_()))


def test_what_it_is_told_and_refuses():
    student, teacher = pair((3, 7))
    indices, log_p = top_k(teacher, 2)
    told = fusedloss.explain(L.kl_divergence, student, (indices, log_p))
    assert told.startswith("native: a teacher of top-k classes")
    for given, options, words in (
        ((indices, log_p[:, :1]), {}, r"of one shape, got \(3, 2\) and \(3, 1\)"),
        ((indices[:2], log_p[:2]), {}, r"rows \(3,\), got shapes \(3, 7\) of the student and \(2, 2\)"),
        ((indices.float(), log_p), {}, "must be integers, got torch.float32"),
        ((indices, log_p), {"rest": "drop"}, "rest must be one of 'bucket', 'renormalise', got 'drop'"),
        ((indices, log_p), {"teacher_is": "probs"}, "got teacher_is='probs'"),
    ):
        with pytest.raises(ValueError, match=words):
            L.kl_divergence(student, given, **options)


@on_cpu_alone("a GPU is not asked; its gather asserts")
@pytest.mark.parametrize("wrong", [7, -1])
def test_an_index_out_of_range(wrong):
    student, teacher = pair((3, 7))
    indices, log_p = top_k(teacher, 2)
    indices[1, 0] = wrong
    with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for 7 classes"):
        L.kl_divergence(student, (indices, log_p))


def test_ignored_rows_may_hold_anything():
    student, teacher = pair((3, 7))
    indices, log_p = top_k(teacher, 2)
    labels = torch.tensor([0, -100, 1], device=student.device)
    expected = L.kl_divergence(student[[0, 2]], (indices[[0, 2]], log_p[[0, 2]]))
    student[1], log_p[1] = math.nan, math.inf
    student.requires_grad_()
    loss = L.kl_divergence(student, (indices, log_p), labels=labels)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad[1] == 0).all() and grad.isfinite().all()
