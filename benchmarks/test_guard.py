"""What the guard lets pass, with made-up ratios."""

import json

from .case import Case
from .guard import FLOORS, best, cases, check

COMMITTED = json.loads(FLOORS.read_text())["floors"]


def test_the_best_of_three_attempts_counts() -> None:
    disturbed, slow = iter([0.5, 0.9, 0.1]), iter([0.5, 0.7, 0.6, 9.0])
    assert best(lambda: next(disturbed), 0.8) == 0.9 and next(disturbed) == 0.1
    assert best(lambda: next(slow), 0.8) == 0.7 and next(slow) == 9.0


def test_half_the_speed_fails() -> None:
    """A floor is 60 % of what was measured, so that half of it misses every floor."""

    def measured(case: Case) -> float:
        return COMMITTED[case.name] / 0.6

    assert check(COMMITTED, measured) == []
    slow = check(COMMITTED, lambda case: measured(case) / (2 if case.name == "focal-fp32-1024x1000" else 1))
    assert len(slow) == 1 and slow[0].startswith("focal-fp32-1024x1000 ")


def test_a_case_without_a_floor_fails() -> None:
    name = next(iter(cases())).name
    without = {other: floor for other, floor in COMMITTED.items() if other != name}
    assert "write it anew" in check(without, lambda case: 99.0)[0]
