"""Computes the numbers in csrc/losses/math.h and functions.h, and prints them as they stand there.

    python tools/coefficients.py

To add a polynomial:
1. Rearrange the function so that its first terms are exact and a polynomial P makes up the rest, as
   exp(r) = 1 + r + r^2 P(r) does.
2. Add a line to FITS: the exact values of P, its interval and degree, and as weight what an error of P is multiplied by
   to become a relative error of the function.
3. Run this script. Raise the degree until the error is a tenth of a rounding step or less (6e-9 in float, 1e-17 in
   double). More gains nothing, because the arithmetic itself rounds.
4. Copy the printed numbers into the header, in the printed order. tests/accuracy/test_coefficients.py compares the two.
5. Add the function to tools/accuracy.py and run that: it measures the compiled function, all roundings included.

For each fit it prints the largest error in exact arithmetic, of the exact coefficients and of the rounded ones.

It needs numpy, and mpmath, which comes with torch. minimax.py fits polynomials, rational.py fits tanh and log_cosh.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from minimax import Function, Polynomial, chebyshev, evaluate, fit_polynomial
from mpmath import mp, mpf
from rational import RationalPair, fit_pair, relative_error, round_pair

FLOAT, DOUBLE = np.float32, np.float64


@cache
def exp_rest(r: mpf) -> mpf:
    """P of exp(r) = 1 + r + r^2 P(r)."""
    return (mp.exp(r) - 1 - r) / r**2 if r else mpf(1) / 2


@cache
def atanh_rest(z: mpf) -> mpf:
    """P of atanh(s) = s + s^3 P(z) with z = s^2; log(m) = 2 atanh(s) with s = (m - 1) / (m + 1)."""
    s = mp.sqrt(z)
    return (mp.atanh(s) / s - 1) / z if z else mpf(1) / 3


@cache
def log1p_rest(w: mpf) -> mpf:
    """P of -log(1 - w) = w + w^2 P(w), all of whose coefficients are positive."""
    return (-mp.log1p(-w) - w) / w**2 if w else mpf(1) / 2


@cache
def tanh_over_x(z: mpf) -> mpf:
    x = mp.sqrt(z)
    return mp.tanh(x) / x if z else mpf(1)


@cache
def log_cosh_over_square(z: mpf) -> mpf:
    return mp.log(mp.cosh(mp.sqrt(z))) / z if z else mpf(1) / 2


def exp_fit(degree: int) -> Polynomial:
    half = mp.log(2) / 2  # exp(x) = 2^k exp(r) leaves |r| <= log(2) / 2
    return Polynomial(exp_rest, lambda r: r**2 / mp.exp(r), -half, half, degree)


def atanh_fit(degree: int, largest: mpf, weight: Function = lambda z: z) -> Polynomial:
    """On |s| <= largest. The weight gives the error relative to s."""
    return Polynomial(atanh_rest, weight, mpf(0), largest**2, degree)


def log1p_fit(degree: int) -> Polynomial:
    """On 0 <= -w <= 1/4, where the special function unit's log(1 - w) would lose digits."""
    return Polynomial(log1p_rest, lambda w: w**2 / -mp.log1p(-w) if w else w, mpf(-1) / 4, mpf(0), degree)


# log(m) with sqrt(1/2) <= m <= sqrt(2), and log(1 + u) = 2 atanh(u / (2 + u)) with 0 <= u <= 1.
OF_LOG, OF_LOG1P = 3 - 2 * mp.sqrt(2), mpf(1) / 3


def unweighted(z: mpf) -> mpf:
    """For pow, which needs more digits of the log than its type has: the error of P itself is the least."""
    return mpf(1)


# Name, header, type and fit, in the order of the headers.
FITS: list[tuple[str, str, type[np.floating], Polynomial]] = [
    ("exp", "math.h", FLOAT, exp_fit(4)),
    ("atanh", "math.h", FLOAT, atanh_fit(3, OF_LOG1P)),
    ("log", "math.h", FLOAT, atanh_fit(2, OF_LOG)),
    ("exp", "math.h", DOUBLE, exp_fit(9)),
    ("atanh", "math.h", DOUBLE, atanh_fit(10, OF_LOG1P)),
    ("log", "math.h", DOUBLE, atanh_fit(6, OF_LOG)),
    ("log1p for half types", "math.h", FLOAT, log1p_fit(3)),
    ("log of pow", "functions.h", FLOAT, atanh_fit(3, OF_LOG, unweighted)),
    ("log of pow", "functions.h", DOUBLE, atanh_fit(8, OF_LOG, unweighted)),
]
HYPERBOLIC = RationalPair((tanh_over_x, log_cosh_over_square), mpf(64), 7)  # in z = x^2 for |x| <= 8


def in_two_parts(x: mpf, bits: int) -> list[mpf]:
    """x as high + low (Cody and Waite). high keeps only so many bits that its product with an exponent k is exact."""
    high = mp.floor(mp.ldexp(x, bits)) / mpf(2) ** bits
    return [high, x - high]


LOG2, LOG2E = mp.log(2), 1 / mp.log(2)
ROUNDED_LOG2E = mpf(float(FLOAT(float(LOG2E))))
CONSTANTS: list[tuple[str, str, type[np.floating], list[mpf]]] = [
    ("1.5 * 2^mantissa", "math.h", FLOAT, [mpf(1.5) * 2**23]),
    ("log(2), high and low", "math.h", FLOAT, in_two_parts(LOG2, 15)),
    ("sqrt(1/2)", "math.h", FLOAT, [mp.sqrt(0.5)]),
    ("smallest normal number, 2^(mantissa + 1)", "math.h", FLOAT, [mpf(2) ** -126, mpf(2) ** 24]),
    ("1.5 * 2^mantissa", "math.h", DOUBLE, [mpf(1.5) * 2**52]),
    ("log(2), high and low", "math.h", DOUBLE, in_two_parts(LOG2, 32)),
    ("sqrt(1/2)", "math.h", DOUBLE, [mp.sqrt(0.5)]),
    ("smallest normal number, 2^(mantissa + 2)", "math.h", DOUBLE, [mpf(2) ** -1022, mpf(2) ** 54]),
    ("log2(e), what rounding it loses, log(2)", "math.h", FLOAT, [ROUNDED_LOG2E, LOG2E - ROUNDED_LOG2E, LOG2]),
    ("log2(e)", "math.h", DOUBLE, [LOG2E]),
    ("log2(e)", "functions.h", DOUBLE, [LOG2E]),
    ("log(2)", "functions.h", DOUBLE, [LOG2]),
    ("log(2)", "functions.h", FLOAT, [LOG2]),
]


@dataclass(frozen=True)
class Numbers:
    """Numbers that stand one after the other in a header."""

    name: str
    header: str
    values: list[np.floating]  # in the order of the header
    code: str
    note: str = ""


def numbers() -> Iterator[Numbers]:
    yield from constants()
    yield from polynomials()
    yield from hyperbolic()


def constants() -> Iterator[Numbers]:
    for name, header, dtype, exact in CONSTANTS:
        values = [dtype(float(x)) for x in exact]
        bits = f" (bits {hex(int.from_bytes(values[0].tobytes(), 'little'))})" if name == "sqrt(1/2)" else ""
        yield Numbers(f"{name}, {type_name(dtype)}", header, values, ", ".join(map(literal, values)) + bits)


def polynomials() -> Iterator[Numbers]:
    for name, header, dtype, fit in FITS:
        exact = fit_polynomial(fit)
        values = [dtype(float(c)) for c in exact]
        note = f"error {polynomial_error(fit, exact):.2g}, rounded {polynomial_error(fit, values):.2g}"
        yield Numbers(f"{name}, {type_name(dtype)}", header, values[::-1], horner(values), note)


def hyperbolic() -> Iterator[Numbers]:
    exact = fit_pair(HYPERBOLIC)
    rounded = round_pair(HYPERBOLIC, exact)
    errors = [
        " and ".join(
            f"{rational_error(f, n, rows[2]):.2g}" for f, n in zip(HYPERBOLIC.functions, rows[:2], strict=True)
        )
        for rows in (exact, rounded)
    ]
    note = f"errors of the two {errors[0]}, rounded {errors[1]}"
    for name, values in zip(("tanh(x) / x", "log(cosh(x)) / x^2", "denominator of both"), rounded, strict=True):
        yield Numbers(f"{name}, float", "functions.h", list(values), f"{{{', '.join(map(literal, values))}}}", note)


def polynomial_error(fit: Polynomial, coefficients: Sequence[mpf | np.floating]) -> float:
    """The largest error, weighted as in the fit: the relative error of the function, or, for pow, the error of P."""
    exact = as_exact(coefficients)
    points = chebyshev(fit.low, fit.high, 200)
    return float(max(abs(fit.weight(x) * (fit.function(x) - evaluate(exact, x))) for x in points))


def rational_error(f: Function, p: Sequence[mpf | np.floating], d: Sequence[mpf | np.floating]) -> float:
    error = relative_error(f, as_exact(p), as_exact(d))
    return float(max(abs(error(x * x)) for x in chebyshev(mpf(0), mp.sqrt(HYPERBOLIC.high), 200)))


def as_exact(coefficients: Sequence[mpf | np.floating]) -> list[mpf]:
    return [mpf(float(c)) if isinstance(c, np.floating) else c for c in coefficients]


def type_name(dtype: type[np.floating]) -> str:
    return "float" if dtype is FLOAT else "double"


def literal(x: np.floating) -> str:
    """The shortest C++ literal that means exactly x."""
    digits = f"{int(x)}.0" if x > 1e6 else str(x).replace("e-0", "e-")
    return digits + ("f" if isinstance(x, FLOAT) else "")


def horner(values: Sequence[np.floating]) -> str:
    first, *middle, last = map(literal, values[::-1])
    return "\n".join([f"p = {first};", *(f"p = p * x + {c};" for c in middle), f"return p * x + {last};"])


if __name__ == "__main__":
    for found in numbers():
        print(f"{found.header}: {found.name}{'; ' if found.note else ''}{found.note}\n{found.code}\n")
