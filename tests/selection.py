"""Which tests run: without --deep none marked deep, and of a thinned grid a few cases with every value or pair.

A grid whose cases take seconds may be thinned with --deep too.
"""

import zlib
from collections import Counter
from collections.abc import Hashable
from itertools import combinations

import pytest

Values = tuple[tuple[str, Hashable], ...]


def selected(items: list[pytest.Item], wanted: str) -> tuple[list[pytest.Item], Counter[str]]:
    """The tests of a "default", "deep" or "rest" run, and how many of each kind a default run leaves out."""
    never = set(_left_out_of_grids(items, deep=True))
    items = [item for item in items if item not in never]
    kinds = dict.fromkeys(_left_out_of_grids(items), "cases of thinned grids: every value of each parameter ran")
    kinds |= {item: mark.args[0] for item in items if (mark := item.get_closest_marker("deep"))}
    examples = [item for item in items if item.get_closest_marker("examples")]
    left_out = Counter(kinds.values())
    if examples:
        left_out["tests that ran 100 random calls, with 2,000"] = len(examples)
    if wanted == "deep":
        return items, left_out
    rest = set(kinds) | set(examples)
    return [item for item in items if (item in rest if wanted == "rest" else item not in kinds)], left_out


def part_of(items: list[pytest.Item], part: str) -> list[pytest.Item]:
    """The tests of part "k/n", one of n that have about as many tests: those whose names fall into it."""
    number, of = map(int, part.split("/"))
    if not 1 <= number <= of:
        raise pytest.UsageError(f"--part: expected k/n with 1 <= k <= n, got {part}")
    return [item for item in items if zlib.crc32(item.nodeid.encode()) % of == number - 1]


def minutes(item: pytest.Item) -> float:
    """What a deep test says of its time; those of minutes begin, so that no worker is left alone with one."""
    mark = item.get_closest_marker("deep")
    return mark.kwargs.get("minutes", 0) if mark else 0


def _left_out_of_grids(items: list[pytest.Item], deep: bool = False) -> list[pytest.Item]:
    grids: dict[Hashable, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("thinned"):
            grids.setdefault((item.path, item.originalname), []).append(item)
    left_out = []
    for grid in grids.values():
        mark = grid[0].get_closest_marker("thinned")
        together = mark.kwargs.get("deep", 0) if deep else (mark.args or (2,))[0]
        if together:
            left_out += left_out_of(grid, together)
    return left_out


def left_out_of(grid: list[pytest.Function], together: int) -> list[pytest.Function]:
    """All but some that together have every value of each parameter, or every pair of values of any two parameters.

    Those come first that have the most values or pairs that no other had before.
    """
    values = [(item, _values(item, together)) for item in grid]
    missing = {each for _, some in values for each in some}
    chosen = set()
    for least in range(max(len(some) for _, some in values), 0, -1):
        for item, some in values:
            if item not in chosen and len(some & missing) >= least:
                chosen.add(item)
                missing -= some
    return [item for item in grid if item not in chosen]


def _values(item: pytest.Function, together: int) -> set[Values]:
    values = [(name, _key(value)) for name, value in sorted(item.callspec.params.items())]
    return set(combinations(values, min(together, len(values))))


def _key(value: object) -> Hashable:
    """The same for equal values; a loss is known by its name."""
    return getattr(value, "name", None) or repr(value)
