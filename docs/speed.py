"""Draws docs/speed.svg, the times in the README's table: ``python docs/speed.py``.

``--check`` writes nothing, and fails where the picture is not that of the table.
"""

import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "speed.svg"

SECONDS = {"us": 1e-6, "ms": 1e-3}
PROVIDERS = {"torch eager": "#8a8a8a", "torch.compile": "#3b78b5", "fusedloss": "#c8322b"}
FIRST, LAST = -5, -1  # decades of the axis, in seconds: 10 us to 100 ms
LEFT, WIDTH, TOP, ROW = 290, 440, 58, 40
UNITS = ["10 us", "100 us", "1 ms", "10 ms", "100 ms"]

Case = tuple[str, dict[str, float]]


def cases(readme: str) -> list[Case]:
    """The rows of the table whose columns are named as the providers: a name, and seconds."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("|")]
    (head,) = (i for i, row in enumerate(rows) if set(PROVIDERS) <= set(row))
    found = []
    for row in rows[head + 2 :]:
        if len(row) != len(rows[head]):
            break
        cell = dict(zip(rows[head], row, strict=True))
        found.append((cell["case"], {provider: seconds(cell[provider]) for provider in PROVIDERS}))
    return found


def seconds(time: str) -> float:
    found = re.fullmatch(r"([\d.]+) (us|ms)", time)
    assert found, f"expected a time as 5.96 ms, found {time!r}"
    return float(found[1]) * SECONDS[found[2]]


def place(time: float) -> float:
    return LEFT + WIDTH * (math.log10(time) - FIRST) / (LAST - FIRST)


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def dot(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{color}"/>'


def svg(found: list[Case]) -> str:
    bottom = TOP + ROW * len(found)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 40}" font-family="sans-serif" '
        'font-size="13" fill="#222222">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for i, (provider, color) in enumerate(PROVIDERS.items()):
        lines += [dot(LEFT + 8 + 140 * i, 22, color), text(LEFT + 20 + 140 * i, 27, provider)]
    for i, unit in enumerate(UNITS):
        x = place(10.0 ** (FIRST + i))
        lines.append(f'<path d="M{x:.1f} {TOP - 14}V{bottom}" stroke="#dddddd"/>')
        lines.append(text(x, bottom + 20, unit, "middle"))
    for i, (name, times) in enumerate(found):
        y = TOP + ROW * i + 10
        points = [place(time) for time in times.values()]
        lines.append(text(LEFT - 14, y + 5, name, "end"))
        lines.append(f'<path d="M{min(points):.1f} {y}H{max(points):.1f}" stroke="#bbbbbb" stroke-width="2"/>')
        lines += [dot(place(times[provider]), y, color) for provider, color in PROVIDERS.items()]
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    drawn = svg(cases(README.read_text()))
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(drawn)
    elif not PICTURE.exists() or PICTURE.read_text() != drawn:
        print("docs/speed.svg is not the picture of the README's table: python docs/speed.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
