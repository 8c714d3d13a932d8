"""Two rational functions over one denominator, whose largest relative error is as small as it can be.

As in minimax.py, the error of the best fit has one more extremum of equal size than there are coefficients, and the
algorithm moves from guessed extrema to real ones. Here they belong to two functions, in any share, and the equations
are not linear. So the guess has to be good: least squares make it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from minimax import CLOSE, Function, chebyshev, evaluate, extrema, peaks
from mpmath import mp, mpf


@dataclass(frozen=True)
class RationalPair:
    """P / D and Q / D on [0, high] for the least relative error of both, with exact values at 0 and D(0) = 1.

    All three are polynomials of one degree.
    """

    functions: tuple[Function, Function]
    high: mpf
    degree: int


def fit_pair(pair: RationalPair) -> tuple[list[mpf], list[mpf], list[mpf]]:
    """P, Q and D. A point is a function, 0 or 1, an x where its error is extreme, and that error."""
    degree, count = pair.degree, 3 * pair.degree + 1
    grid = [x * x for x in chebyshev(mpf(0), mp.sqrt(pair.high), 8 * count)][1:]  # the error at 0 is 0
    at_zero = [f(mpf(0)) for f in pair.functions]
    d, errors = guess_pair(pair, grid)
    points = [(k, grid[i], mpf(float(errors[k][i]))) for k in (0, 1) for i in peaks(errors[k])]
    points = largest(points, count)
    level = max(abs(e) for _, _, e in points)

    for _ in range(20):
        for _ in range(2):  # Newton's method for P - f (1 + e) D = 0, where e is the level with the sign of the error
            rows, right = [], []
            for k, x, e in points:
                sign, powers = mp.sign(e), [x**j for j in range(1, degree + 1)]
                f, zeros = pair.functions[k](x), [mpf(0)] * degree
                scaled = [-f * (1 + sign * level) * power for power in powers]
                slope = -sign * f * evaluate(d, x)
                rows.append([*(zeros if k else powers), *(powers if k else zeros), *scaled, slope])
                right.append(f * (1 + sign * level) - at_zero[k] + level * slope)
            *solution, level = mp.lu_solve(mp.matrix(rows), mp.matrix(right))
            d = [mpf(1), *solution[2 * degree :]]
        p, q = [at_zero[0], *solution[:degree]], [at_zero[1], *solution[degree : 2 * degree]]
        error = [relative_error(f, n, d) for f, n in zip(pair.functions, (p, q), strict=True)]
        points = largest([(k, x, error[k](x)) for k in (0, 1) for x in extrema(error[k], grid)], count)
        if max(abs(e) for _, _, e in points) < abs(level) * (1 + CLOSE):
            return p, q, d
    raise ArithmeticError("the fit did not converge")


def round_pair(pair: RationalPair, fit: Sequence[Sequence[mpf]]) -> np.ndarray:
    """P, Q and D in float.

    Rounding each number to nearest would nearly double the error of the fit. So numbers move on to a neighbouring
    float, one at a time, until no such move makes the error smaller.
    """
    points = [x * x for x in chebyshev(mpf(0), mp.sqrt(pair.high), 300)][1:]
    x = np.array([float(x) for x in points])
    exact = [np.array([float(f(x)) for x in points]) for f in pair.functions]

    def error(rows: np.ndarray) -> float:
        p, q, d = (np.polyval(row[::-1].astype(float), x) for row in rows)
        return max(np.abs(n / (d * f) - 1).max() for n, f in zip((p, q), exact, strict=True))

    best: np.ndarray | None = np.array([[float(c) for c in row] for row in fit], dtype=np.float32)
    while best is not None:
        rounded, least = best, error(best)
        best = next((rows for rows in neighbours(rounded) if error(rows) < least), None)
    return rounded


def neighbours(rows: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(rows.shape[0]):
        for k in range(1, rows.shape[1]):
            for end in (np.inf, -np.inf):
                moved = rows.copy()
                moved[i, k] = np.nextafter(moved[i, k], np.float32(end))
                yield moved


def relative_error(f: Function, numerator: Sequence[mpf], denominator: Sequence[mpf]) -> Function:
    return lambda x: evaluate(numerator, x) / (evaluate(denominator, x) * f(x)) - 1


def largest(points: list[tuple[int, mpf, mpf]], count: int) -> list[tuple[int, mpf, mpf]]:
    return sorted(points, key=lambda point: abs(point[2]), reverse=True)[:count]


def guess_pair(pair: RationalPair, points: list[mpf]) -> tuple[list[mpf], list[np.ndarray]]:
    """D and both errors near the optimum, by least squares whose weights grow where the error is large (Lawson)."""
    x = np.array([float(x / pair.high) for x in points])
    exact = [np.array([float(f(x)) for x in points]) for f in pair.functions]
    at_zero = [float(f(mpf(0))) for f in pair.functions]
    # x T_k(2x - 1), because in powers of x double precision would not do.
    basis = x[:, None] * np.polynomial.chebyshev.chebvander(2 * x - 1, pair.degree - 1)
    zero, denominator, weights = np.zeros_like(basis), np.ones_like(x), np.ones(2 * len(x))
    for _ in range(200):
        p, q = (basis / (f * denominator)[:, None] for f in exact)
        d = -basis / denominator[:, None]
        matrix, root = np.block([[p, zero, d], [zero, q, d]]), np.sqrt(weights)
        right = np.concatenate([(f - f0) / (f * denominator) for f, f0 in zip(exact, at_zero, strict=True)])
        *numerators, c = np.split(np.linalg.lstsq(matrix * root[:, None], right * root, rcond=1e-17)[0], 3)
        denominator = 1 + basis @ c
        errors = [(f0 + basis @ n) / (f * denominator) - 1 for f, f0, n in zip(exact, at_zero, numerators, strict=True)]
        weights *= np.abs(np.concatenate(errors)) / np.abs(errors).max() + 1e-4
        weights /= weights.sum()
    powers = np.polynomial.Chebyshev(c, domain=[0, 1]).convert(kind=np.polynomial.Polynomial).coef
    return [mpf(1), *(mpf(float(a)) / pair.high ** (k + 1) for k, a in enumerate(powers))], errors
