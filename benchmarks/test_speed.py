"""Forward and backward of every case: right gradients, and with --enforce the goals. The tables come at the end."""

from collections.abc import Callable

import pytest

from .case import Case
from .results import Row


def test_speed(case: Case, measured: Callable[[Case], Row], pytestconfig: pytest.Config) -> None:
    row = measured(case)
    assert not row.missing  # what torch.compile makes of torch's loss must have its gradient too
    if pytestconfig.getoption("--enforce"):
        assert not row.unmet(None)
