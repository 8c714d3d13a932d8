"""Random calls from one draw of Hypothesis: a draw for each of a call's choices would take longer than the call."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
BYTES = 20  # a call's choices come to 16 at most


class Choices:
    """The digits of one large number, each in the base of what there is to choose from. Of 0, all are the first."""

    def __init__(self, drawn: bytes) -> None:
        self._left = int.from_bytes(drawn, "big")

    def between(self, least: int, most: int) -> int:
        self._left, digit = divmod(self._left, most - least + 1)
        return least + digit

    def of(self, values: Sequence[T]) -> T:
        return values[self.between(0, len(values) - 1)]

    def permuted(self, values: Sequence[T]) -> list[T]:
        left = list(values)
        return [left.pop(self.between(0, len(left) - 1)) for _ in values]


def one_draw(make: Callable[[Choices], T]) -> st.SearchStrategy[T]:
    return st.binary(min_size=BYTES, max_size=BYTES).map(lambda drawn: make(Choices(drawn)))
