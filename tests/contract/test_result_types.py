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
