"""Results whose type depends on a flag: mypy checks what is declared, and the tests what is returned."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import fusedloss.functional as L


def data() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 3), torch.tensor([0, 1])


def test_cross_entropy() -> None:
    loss = assert_type(L.cross_entropy(*data()), Tensor)
    assert isinstance(loss, Tensor)
    pair = assert_type(L.cross_entropy(*data(), return_lse=True), tuple[Tensor, Tensor])
    assert isinstance(pair, tuple) and len(pair) == 2
    for flag in (False, True):
        either = assert_type(L.cross_entropy(*data(), return_lse=flag), Tensor | tuple[Tensor, Tensor])
        assert isinstance(either, tuple) == flag


def test_log_probs() -> None:
    values = assert_type(L.log_probs(*data()), Tensor)
    assert isinstance(values, Tensor)
    pair = assert_type(L.log_probs(*data(), return_entropy=True), tuple[Tensor, Tensor])
    assert isinstance(pair, tuple) and len(pair) == 2
    for flag in (False, True):
        either = assert_type(L.log_probs(*data(), return_entropy=flag), Tensor | tuple[Tensor, Tensor])
        assert isinstance(either, tuple) == flag


def test_linear_cross_entropy() -> None:
    hidden, head, target = torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 1])
    loss = assert_type(L.linear_cross_entropy(hidden, head, target), Tensor)
    assert isinstance(loss, Tensor)
    some = assert_type(L.linear_cross_entropy(hidden, head, target, return_lse=True), Tensor | tuple[Tensor, ...])
    assert isinstance(some, tuple) and len(some) == 2
    some = L.linear_cross_entropy(hidden, head, target, return_lse=True, return_accuracy=True)
    assert isinstance(some, tuple) and len(some) == 3


def test_linear_log_probs() -> None:
    hidden, head, target = torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 1])
    values = assert_type(L.linear_log_probs(hidden, head, target), Tensor)
    assert isinstance(values, Tensor)
    pair = assert_type(L.linear_log_probs(hidden, head, target, return_entropy=True), tuple[Tensor, Tensor])
    assert isinstance(pair, tuple) and len(pair) == 2
