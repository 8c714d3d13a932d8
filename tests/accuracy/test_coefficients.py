"""The numbers in csrc/losses are those that tools/coefficients.py computes."""

import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from coefficients import Numbers, literal, numbers  # noqa: E402

FLOAT_OR_BITS = re.compile(r"(?<![\w.])(?:(\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)(f?)|0x([0-9a-f]{16}|[0-9a-f]{8}))\b")
LONG = 6  # digits; a shorter number, such as 0.5 or 88.0, was chosen rather than computed

HEADERS = {
    name: re.sub(r"//.*", "", (ROOT / "csrc" / "losses" / name).read_text()) for name in ("math.h", "functions.h")
}


@cache
def computed(header: str) -> list[Numbers]:
    return [found for found in all_computed() if found.header == header]


@cache
def all_computed() -> list[Numbers]:
    """Takes two seconds, so only when a test asks for it."""
    return list(numbers())


def literals(text: str) -> list[tuple[str, np.floating]]:
    """Floating-point literals and the bits of such numbers, as written and as the compiler reads them."""
    found = []
    for match in FLOAT_OR_BITS.finditer(text):
        digits, suffix, bits = match.groups()
        if bits:
            value = np.frombuffer(bytes.fromhex(bits)[::-1], np.float32 if len(bits) == 8 else np.float64)[0]
        else:
            value = (np.float32 if suffix else np.float64)(digits)
        found.append((match.group(), value))
    return found


def same(a: np.floating, b: np.floating) -> bool:
    return type(a) is type(b) and bool(a == b)


def is_long(written: str) -> bool:
    digits = written.split("e")[0].replace(".", "").strip("0")
    return written.startswith("0x") or len(digits.rstrip("f")) >= LONG


def differences(header: str, text: str) -> list[str]:
    """The computed numbers that the header lacks or has in another order, and those in it that nobody computed."""
    there = literals(text)
    ours = computed(header)
    missing = []
    for found in ours:
        size = len(found.values)
        runs = [[value for _, value in there[i : i + size]] for i in range(len(there) - size + 1)]
        if not any(all(map(same, run, found.values)) for run in runs):
            missing.append(f"{header} lacks {found.name}: {', '.join(map(literal, found.values))}")
    unknown = [
        f"{header} has {written}, which tools/coefficients.py does not compute"
        for written, value in there
        if is_long(written) and not any(same(value, other) for found in ours for other in found.values)
    ]
    return missing + unknown


@pytest.mark.parametrize("header", HEADERS)
def test_the_header_has_the_computed_numbers(header):
    found = differences(header, HEADERS[header])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("header", HEADERS)
def test_a_number_changed_by_hand_is_found(header):
    code = HEADERS[header]
    changed = 0
    for match, (written, value) in zip(FLOAT_OR_BITS.finditer(code), literals(code), strict=True):
        if is_long(written):
            next_to_it = literal(np.nextafter(value, np.inf, dtype=type(value)))
            assert differences(header, code[: match.start()] + next_to_it + code[match.end() :]), written
            changed += 1
    assert changed >= sum(len(found.values) for found in computed(header)) - 3  # 0.5, 1.0 and 1.0 are short
