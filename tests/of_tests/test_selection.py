"""A thinned grid keeps every value, or every pair of values, in fewer cases."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
import selection

GRID = {"loss": ["huber", "mse", "focal"], "layout": range(5), "reduction": [0, 1]}


class Case:
    def __init__(self, values):
        self.callspec = SimpleNamespace(params=dict(zip(GRID, values, strict=True)))


def cases():
    return [Case(values) for values in product(*GRID.values())]


def values_of(kept, together):
    params = [case.callspec.params for case in kept]
    return {(names, tuple(each[name] for name in names)) for each in params for names in combinations(GRID, together)}


def kept_of(grid, together):
    left_out = selection.left_out_of(grid, together)
    return [case for case in grid if case not in left_out]


@pytest.mark.parametrize("together, most", [(1, 5), (2, 18)])
def test_every_value_or_pair_is_kept_in_fewer_cases(together, most):
    grid = cases()
    kept = kept_of(grid, together)
    assert values_of(kept, together) == values_of(grid, together)
    assert len(kept) <= most < len(grid) == 30


def test_what_a_short_run_keeps_of_a_thorough_one_has_every_value():
    grid = cases()
    short = kept_of(kept_of(grid, 2), 1)
    assert values_of(short, 1) == values_of(grid, 1)


def test_parts_are_all_tests_once():
    tests = [SimpleNamespace(nodeid=f"test_file.py::test[{i}]") for i in range(300)]
    parts = [selection.part_of(tests, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(test.nodeid for part in parts for test in part) == sorted(test.nodeid for test in tests)
    assert all(70 < len(part) < 130 for part in parts)
    assert selection.part_of(tests, "1/1") == tests
    with pytest.raises(pytest.UsageError, match="expected k/n with 1 <= k <= n, got 4/3"):
        selection.part_of(tests, "4/3")
