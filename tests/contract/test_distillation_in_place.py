"""The ops that write a divergence's gradient over the student's rows, which linear losses make of their chunks."""

import pytest
import torch
from distillation_calls import DIRECTIONS, pair
from losses import DTYPES
from marks import needs_extension
from torch import Tensor

pytestmark = needs_extension
KIND = ("logits", 1.7, 0.3)


def apart(student: Tensor, teacher: Tensor, weight: Tensor | None, direction: str, upstream: Tensor) -> list[Tensor]:
    """Loss, its gradient, the statistics of the rows, and the gradient for an upstream gradient of each."""
    ops, rest = torch.ops.fusedloss, (direction, KIND[0], "sum", 0, *KIND[1:])
    loss, _, statistics, grad = ops.kl_divergence(student, teacher, None, weight, *rest, True, False, True)
    of_rows = ops.kl_divergence_backward(
        upstream, None, student, teacher, None, weight, statistics, direction, KIND[0], "none", 0, *KIND[1:]
    )
    return [loss, grad, statistics, of_rows]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["dense", "padded", "turned"])
def test_they_write_what_the_others_return(memory, dtype, direction):
    student, teacher = pair((7, 2100), dtype)
    weight = torch.tensor([1.0, 0.5, 0, 2, 1, 1, 3], dtype=dtype, device=student.device)
    upstream = torch.linspace(-1, 1, 7, dtype=student.double().dtype, device=student.device).to(dtype)
    loss, grad, statistics, of_rows = apart(student, teacher, weight, direction, upstream)

    def copy() -> Tensor:
        if memory == "padded":
            return torch.cat([student, student], 1)[:, :2100]
        return student.clone() if memory == "dense" else student.t().contiguous().t()

    over = copy()
    got = torch.ops.fusedloss.kl_divergence_with_grad_(over, teacher, weight, direction, *KIND)
    torch.testing.assert_close(got, loss, rtol=0, atol=0)
    torch.testing.assert_close(over, grad, rtol=0, atol=0)
    over = copy()
    version = over._version
    torch.ops.fusedloss.kl_divergence_backward_(upstream, over, teacher, weight, statistics, direction, *KIND)
    torch.testing.assert_close(over, of_rows, rtol=0, atol=0)
    assert over._version == version + 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_teacher_in_the_same_memory_is_read_before_it_is_overwritten(direction):
    rows = torch.cat(pair((6, 1030)), 1)
    student, teacher = rows[:, :1030], rows[:, 500:1530]
    upstream = torch.ones(6, device=rows.device)
    _, grad, statistics, of_rows = apart(student.clone(), teacher.clone(), None, direction, upstream)
    again = rows.clone()
    torch.ops.fusedloss.kl_divergence_with_grad_(again[:, :1030], again[:, 500:1530], None, direction, *KIND)
    torch.testing.assert_close(again[:, :1030], grad, rtol=0, atol=0)
    again = rows.clone()
    torch.ops.fusedloss.kl_divergence_backward_(
        upstream[0], again[:, :1030], again[:, 500:1530], None, statistics, direction, *KIND
    )
    torch.testing.assert_close(again[:, :1030], of_rows, rtol=0, atol=0)


def test_what_they_refuse():
    student, teacher = pair((3, 8))
    run = torch.ops.fusedloss.kl_divergence_with_grad_
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place"):
        run(student.clone().requires_grad_(), teacher, None, "forward", *KIND)
    with pytest.raises(RuntimeError, match="has no derivative"):
        run(student.clone().requires_grad_() * 1, teacher, None, "forward", *KIND)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        run(student[:1].expand(3, 8), teacher, None, "forward", *KIND)
    with pytest.raises(ValueError, match="expected rows of student and teacher of one shape"):
        run(student, teacher[:, :7], None, "forward", *KIND)
    with pytest.raises(RuntimeError, match="expected statistics of size"):
        torch.ops.fusedloss.kl_divergence_backward_(
            torch.ones(3), student, teacher, None, torch.zeros(3), "forward", *KIND
        )
