"""The measure of memory itself, on functions whose peak is known."""

import torch

from fusedloss._bench import peak_bytes


def test_result_counts_in_full() -> None:
    x = torch.zeros(1 << 24)
    assert peak_bytes(x.clone) == x.nbytes == 1 << 26


def test_freed_memory_counts_once() -> None:
    """The first product is freed when the third is made: two of three are alive at a time."""
    x = torch.zeros(1 << 20)
    assert peak_bytes(lambda: x.neg().neg().neg()) == 2 * x.nbytes


def test_nothing_allocated() -> None:
    x = torch.zeros(1 << 20)
    assert peak_bytes(lambda: x.view(-1)) == 0
