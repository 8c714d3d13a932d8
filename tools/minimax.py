"""The polynomial whose largest error on an interval is as small as it can be (minimax), by Remez' algorithm.

The error of that polynomial has degree + 2 extrema of equal size and alternating sign. The algorithm guesses where they
lie, solves for the coefficients whose error has one size there, looks where the extrema of that error really are, and
starts again from those until nothing changes. There is only one such polynomial, so the guess does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mpmath import mp, mpf

mp.dps = 50

Function = Callable[[mpf], mpf]
CLOSE = mpf("1e-15")  # how much the extrema of a finished fit may differ


@dataclass(frozen=True)
class Polynomial:
    """P(x) = c[0] + c[1] x + ... + c[degree] x^degree on [low, high], for the least weight |function - P|."""

    function: Function
    weight: Function
    low: mpf
    high: mpf
    degree: int


def evaluate(coefficients: Sequence[mpf], x: mpf) -> mpf:
    return mp.polyval(coefficients[::-1], x)


def chebyshev(low: mpf, high: mpf, count: int) -> list[mpf]:
    """Points from low to high that lie closer together near both ends."""
    return [low + (high - low) * (1 - mp.cos(mp.pi * i / (count - 1))) / 2 for i in range(count)]


def fit_polynomial(p: Polynomial) -> list[mpf]:
    count = p.degree + 2
    grid = chebyshev(p.low, p.high, 10 * count)
    points = grid[3::10]  # which leaves out the point where a weight may be zero

    def error(x: mpf) -> mpf:
        return p.weight(x) * (p.function(x) - evaluate(coefficients, x))

    for _ in range(20):
        rows = [[p.weight(x) * x**k for k in range(count - 1)] + [mpf(-1) ** i] for i, x in enumerate(points)]
        *coefficients, level = mp.lu_solve(mp.matrix(rows), mp.matrix([p.weight(x) * p.function(x) for x in points]))
        points = extrema(error, grid)
        while len(points) > count:
            points.remove(min(points[0], points[-1], key=lambda x: abs(error(x))))
        if max(abs(error(x)) for x in points) < abs(level) * (1 + CLOSE):
            return coefficients
    raise ArithmeticError("the fit did not converge")


def extrema(error: Function, grid: list[mpf]) -> list[mpf]:
    """The point of the largest |error| between each two of its zeros."""
    last = len(grid) - 1
    found = peaks([error(x) for x in grid])
    return [grid[i] if i in (0, last) else summit(error, grid[i - 1], grid[i], grid[i + 1]) for i in found]


def peaks(errors: Sequence[mpf] | np.ndarray) -> list[int]:
    found: list[int] = []
    for i, e in enumerate(errors):
        if found and e * errors[found[-1]] >= 0:
            found[-1] = max(found[-1], i, key=lambda j: abs(errors[j]))
        else:
            found.append(i)
    return found


def summit(error: Function, low: mpf, x: mpf, high: mpf) -> mpf:
    """The extremum near x: Newton's method for a zero of the slope, with differences in place of derivatives."""
    h = (high - low) * mpf("1e-6")
    for _ in range(3):
        before, at, after = error(x - h), error(x), error(x + h)
        x = min(max(x - h * (after - before) / (2 * (after - 2 * at + before)), low), high)
    return x
