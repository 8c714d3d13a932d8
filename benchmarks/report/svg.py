"""A picture as SVG, for light and dark pages: shapes and words by class, and the two sets of colours."""

from html import escape
from math import log10

# Colours that the usual kinds of colour blindness keep apart; each side has a shape of marker too.
STYLE = """
  text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .page { fill: #ffffff } .soft { fill: #59636e } .bold { font-weight: 600 }
  .rule { stroke: #dfe3e8 } .axis { stroke: #848d97 }
  .line { fill: none; stroke-width: 2 } .dashed { stroke-dasharray: 6 4 }
  .eager { fill: #6b7280 } .compile { fill: #0072b2 } .fused { fill: #d55e00 } .rest { fill: #b9c0c9 }
  .eager-line { stroke: #6b7280 } .fused-line { stroke: #d55e00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117 } .soft { fill: #9da7b3 }
    .rule { stroke: #2a313a } .axis { stroke: #7d8590 }
    .eager { fill: #aab2bd } .compile { fill: #56b4e9 } .fused { fill: #f28c3b } .rest { fill: #4a525d }
    .eager-line { stroke: #aab2bd } .fused-line { stroke: #f28c3b }
  }
"""
WIDTH = 720  # a page's column: shown smaller, 13 pixels would be too few
MARKERS = {
    "eager": '<rect x="{x0:.1f}" y="{y0:.1f}" width="8" height="8" class="eager"/>',
    "compile": '<path d="M{x:.1f} {y1:.1f}l5 5l-5 5l-5 -5z" class="compile"/>',
    "fused": '<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="fused"/>',
}


def line_kind(side: str, dashed: bool) -> str:
    return f"line {side}-line" + " dashed" * dashed


class Scale:
    """Places a value between two pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high, at = (log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


class Picture:
    def __init__(self, title: str, told: str, height: float) -> None:
        """``told`` is a line below the title: what the figures depend on."""
        self.height = height
        self.title = title
        self.parts: list[str] = []
        self.text(16, 26, title, "bold")
        self.text(16, 46, told, "soft")

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        kind = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(words)}</text>')

    def rule(self, x0: float, y0: float, x1: float, y1: float, kind: str = "rule") -> None:
        self.parts.append(f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" class="{kind}"/>')

    def bar(self, x0: float, x1: float, y: float, height: float, kind: str) -> None:
        left, width = min(x0, x1), abs(x1 - x0)
        box = f'x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.parts.append(f'<rect {box} class="{kind}"/>')

    def marker(self, x: float, y: float, side: str) -> None:
        self.parts.append(MARKERS[side].format(x=x, y=y, x0=x - 4, y0=y - 4, y1=y - 5))

    def line(self, points: list[tuple[float, float]], side: str, dashed: bool = False) -> None:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="{line_kind(side, dashed)}"/>')
        for point in points:
            self.marker(*point, side)

    def __str__(self) -> str:
        size = f'width="{WIDTH}" height="{self.height:.0f}" viewBox="0 0 {WIDTH} {self.height:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        page = '<rect width="100%" height="100%" class="page"/>'
        return "\n".join(
            [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", page, *self.parts, "</svg>", ""]
        )
