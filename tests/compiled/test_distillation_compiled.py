"""`kl_divergence` under torch.compile, torch.export and torch.func: eager's results, and the op where it can be."""

import pytest
import torch
from compare import upstreams
from distillation_calls import DIRECTIONS, pair, rows
from marks import needs_extension, on_cpu_alone
from observe import compiled_with_ops
from torch import Tensor
from torch.autograd import forward_ad

import fusedloss
import fusedloss.functional as L


def step(function, student: Tensor, *rest: Tensor) -> list[Tensor]:
    leaf = student.clone().requires_grad_()
    loss = function(leaf, *rest)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, upstreams(loss))]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiled_whole_with_the_op(reduction, direction, dtype):
    torch._dynamo.reset()
    student, teacher = pair((2, 4, 60), dtype)
    labels = torch.tensor([[0, -100, 1, 1], [2, 2, -100, 0]], device=student.device)

    def function(student: Tensor, teacher: Tensor) -> Tensor:
        return L.kl_divergence(
            student, teacher, temperature=2.0, direction=direction, labels=labels, reduction=reduction
        )

    compiled, ops = compiled_with_ops(function)
    for got, expected in zip(step(compiled, student, teacher), step(function, student, teacher), strict=True):
        torch.testing.assert_close(got, expected)
    assert any("fusedloss.kl_divergence" in name for name in ops)


@needs_extension
@on_cpu_alone("a GPU moves fewer bytes with a backward of its own")
@pytest.mark.parametrize("upstream", [0.5, 1.25])
def test_a_compiled_bfloat16_gradient_is_rounded_once(upstream):
    torch._dynamo.reset()
    student, teacher = pair((8, 400), torch.bfloat16)
    compiled, ops = compiled_with_ops(lambda s, t: L.kl_divergence(s, t, reduction="sum") * upstream)
    leaf, eager = (student.clone().requires_grad_() for _ in range(2))
    compiled(leaf, teacher).backward()
    (L.kl_divergence(eager, teacher, reduction="sum") * upstream).backward()
    assert torch.equal(leaf.grad, eager.grad)
    exact = student.double().requires_grad_()
    (upstream * rows(exact, teacher, "forward").sum()).backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1.02 * 2.0**-8, atol=1e-7)
    assert "fusedloss.kl_divergence.carrying" in ops


@needs_extension
@on_cpu_alone("a GPU makes no gradient in forward")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_forward_carries_serves_every_backward(direction):
    student, teacher = pair((8, 40), torch.bfloat16)
    call = (student, teacher, None, None, direction, "logits", "batchmean", -100, 2.0, 0.5)
    _, left = torch.ops.fusedloss.kl_divergence.carrying(*call, False)
    for upstream in (1.0, 3.0, 0.5):
        leaf = student.clone().requires_grad_()
        loss = L.kl_divergence(leaf, teacher, temperature=2.0, direction=direction)
        (expected,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream, dtype=loss.dtype))
        given = (torch.tensor(upstream, dtype=student.dtype), None, *call[:4])
        for statistics in (left, left.clone()):  # a saved tensor may come back as a copy
            grad = torch.ops.fusedloss.kl_divergence_backward(*given, statistics, *call[4:])
            torch.testing.assert_close(grad, expected, rtol=2.0**-7, atol=0)
            grad.zero_()


@needs_extension
def test_compiled_by_inductor_with_sizes_that_change():
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t: L.kl_divergence(s, t, direction="jsd"), fullgraph=True, dynamic=True)
    for count in (5, 9, 12):
        student, teacher = pair((count, 40))
        expected = step(lambda s, t: L.kl_divergence(s, t, direction="jsd"), student, teacher)
        for got, value in zip(step(compiled, student, teacher), expected, strict=True):
            torch.testing.assert_close(got, value)


@needs_extension
def test_a_module_is_exported_with_the_op():
    student, teacher = pair((4, 30))
    labels = torch.tensor([0, 1, 2, -100])
    loss = fusedloss.DistillationLoss(temperature=2.0)
    program = torch.export.export(loss, (student, teacher, labels))
    names = {str(node.target) for node in program.graph.nodes}
    assert "fusedloss.kl_divergence.default" in names
    torch.testing.assert_close(program.module()(student, teacher, labels), loss(student, teacher, labels))
    decomposed = program.run_decompositions()
    assert not any("fusedloss.kl_divergence" in str(node.target) for node in decomposed.graph.nodes)
    torch.testing.assert_close(decomposed.module()(student, teacher, labels), loss(student, teacher, labels))


@needs_extension
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_op_passes_torchs_checks(direction):
    student, teacher = pair((3, 20))
    labels = torch.tensor([0, -100, 1], device=student.device)
    rest = (direction, "logits", "batchmean", -100, 2.0, 0.5, False)
    for with_lse, with_grad in ((True, False), (False, False)):
        arguments = (student.clone().requires_grad_(), teacher, labels, None, *rest, with_lse, with_grad)
        torch.library.opcheck(torch.ops.fusedloss.kl_divergence.default, arguments)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_transforms_run_natively_and_agree(direction):
    student, teacher = pair((5, 9), torch.float64)

    def loss(student: Tensor) -> Tensor:
        return L.kl_divergence(student, teacher, direction=direction)

    value, expected = step(loss, student)
    gradient = torch.func.grad(loss)(student)
    torch.testing.assert_close(gradient * upstreams(value)[0], expected)
    tangent = torch.randn_like(student)
    _, slope = torch.func.jvp(loss, (student,), (tangent,))
    torch.testing.assert_close(slope, (gradient * tangent).sum())
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(student, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
    of_rows = torch.func.vmap(lambda s, t: L.kl_divergence(s, t, direction=direction, reduction="sum"))(
        student, teacher
    )
    torch.testing.assert_close(of_rows, L.kl_divergence(student, teacher, direction=direction, reduction="none"))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_batch_of_upstream_gradients(direction):
    student, teacher = pair((3, 7), torch.float64)
    student.requires_grad_()
    losses = L.kl_divergence(student, teacher, direction=direction, reduction="none")
    batch = torch.eye(3, dtype=torch.float64, device=student.device)
    (batched,) = torch.autograd.grad(losses, student, batch, is_grads_batched=True, retain_graph=True)
    for upstream, got in zip(batch, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(losses, student, upstream, retain_graph=True)[0])
