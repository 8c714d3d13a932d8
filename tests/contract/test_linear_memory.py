"""What a linear loss takes beside its gradients, and that its bits do not depend on the number of threads."""

import pytest
import torch
from linear_calls import indices, norm_error, operands
from losses import HALVES
from marks import needs_extension, on_cpu_alone
from observe import bytes_kept, peak_bytes
from torch import Tensor

import fusedloss.functional as L

ROWS, FEATURES, CLASSES, CHUNK = 512, 64, 32_768, 64
# What each row may keep, and what the matrix products copy of a block of the head.
OF_ROWS, OF_PRODUCTS = 64 * ROWS, 3 * 2**19


def data(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    sizes = {"features": FEATURES, "classes": CLASSES}
    return operands((ROWS,), dtype, **sizes)[:2], indices((ROWS,), classes=CLASSES)


@pytest.mark.thinned(1)
@needs_extension
@on_cpu_alone("counts the CPU's memory")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_beside_the_gradients_a_step_takes_one_chunk(dtype, options):
    leaves, target = data(dtype)

    def step() -> None:
        results = L.linear_cross_entropy(*leaves, target, chunk_rows=CHUNK, **options)
        loss = results[0] if isinstance(results, tuple) else results
        loss.sum().backward()

    step()
    for leaf in leaves:
        leaf.grad = None
    gradients = sum(leaf.numel() * dtype.itemsize for leaf in leaves)
    chunk = CHUNK * CLASSES * dtype.itemsize
    packed = ROWS * FEATURES * (4 if dtype in HALVES else dtype.itemsize) * 2
    extra = peak_bytes(step) - gradients
    assert 0.9 * chunk <= extra <= chunk + packed + OF_ROWS + OF_PRODUCTS
    assert extra < ROWS * CLASSES * dtype.itemsize / 4  # let alone the logits


@needs_extension
@on_cpu_alone("counts the CPU's memory")
def test_without_gradients_in_forward_some_numbers_a_row_are_kept():
    leaves, target = data(torch.float32)
    kept: list[Tensor] = []
    run = lambda **options: kept.append(L.linear_cross_entropy(*leaves, target, chunk_rows=CHUNK, **options))  # noqa: E731
    run()
    assert bytes_kept(lambda: run(grad_in_forward=False)) <= OF_ROWS
    assert bytes_kept(lambda: run(reduction="none")) <= OF_ROWS
    with torch.no_grad():
        assert bytes_kept(run) <= OF_ROWS


@pytest.mark.thinned(1)
@needs_extension
@on_cpu_alone("about threads of the CPU")
@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_same_chunks_give_the_same_bits_in_any_number_of_threads(dtype, options, threads):
    leaves, target = data(dtype)
    results = []
    for count in (1, 2):
        threads(count)
        losses = L.linear_cross_entropy(*leaves, target, chunk_rows=CHUNK, **options)
        results.append((losses, *torch.autograd.grad(losses.sum(), leaves)))
    (loss, *grads), (other_loss, *other_grads) = results
    assert torch.equal(loss, other_loss)
    for grad, other in zip(grads, other_grads, strict=True):
        if dtype in HALVES:
            assert torch.equal(grad, other)
        else:  # MKL's own products share their sums among threads
            assert norm_error(grad, other.double()) < 1e-6


@needs_extension
@on_cpu_alone("about threads of the CPU")
@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
def test_a_sum_of_many_losses_has_the_same_bits_in_any_number_of_threads(options, threads):
    rows = 100_000
    input, weight, _ = operands((rows,), features=2, classes=3)
    target = indices((rows,), classes=3)
    for scale in range(1, 9):  # a sum may be the same by chance
        losses = []
        for count in (1, 2):
            threads(count)
            scaled = {"logit_scale": float(scale), "reduction": "sum", "chunk_rows": rows, **options}
            losses.append(L.linear_cross_entropy(input, weight, target, **scaled))
        assert torch.equal(*losses)
