"""docs/compatibility.md: what runs in each situation, as the tests saw it.

python tests/everywhere/page.py    runs every cell and writes the page
"""

import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":  # pytest puts these folders on the path by itself
    sys.path[:0] = [str(Path(__file__).parent.parent)]

from cells import CELLS, LOSSES, PATHS, Cell, path_of
from compiler import ROOT
from losses import REDUCTIONS
from situations import SITUATIONS

PAGE = ROOT / "docs" / "compatibility.md"

_HEAD = """# Where a loss runs, and how

Every loss in every situation gives the numbers that plain PyTorch gives there. This table says what computes them: the
kernels (**fused**) or plain PyTorch (**native**). What torch refuses is refused with its error (**refused**). The
derivative of a gradient is made by PyTorch's operators where the forward was fused, and the backward of a batch of
upstream gradients is native. `fusedloss.explain` tells for a single call.

Each row was run for {losses} losses and {reductions} reductions, float32 on a CPU: {cells} cells, of which {counts}.
The losses: {names}.

| Situation | Fused | Native | Refused, as by torch |
|---|---|---|---|
"""


def _words(cells: Iterable[Cell]) -> str:
    """Losses with the reductions, if not all of them."""
    found: dict[str, list[str]] = {}
    for _, loss, reduction in cells:
        found.setdefault(loss, []).append(reduction)
    by_reductions: dict[tuple[str, ...], list[str]] = {}
    for loss, reductions in found.items():
        by_reductions.setdefault(tuple(reductions), []).append(loss)
    parts = []
    for reductions, losses in by_reductions.items():
        others = [loss.name for loss in LOSSES if loss.name not in losses]
        of = "; ".join(losses) if len(losses) < len(others) else "; ".join(others)
        if len(losses) >= len(others):
            of = f"all but {of}" if others else "all"
        parts.append(of if len(reductions) == len(REDUCTIONS) else f"{of} ({', '.join(reductions)})")
    return " + ".join(parts)


def text(paths: dict[Cell, str]) -> str:
    counts = ", ".join(f"{list(paths.values()).count(path)} {path}" for path in PATHS)
    names = "; ".join(loss.name for loss in LOSSES)
    head = _HEAD.format(losses=len(LOSSES), reductions=len(REDUCTIONS), cells=len(paths), counts=counts, names=names)
    rows = []
    for situation in SITUATIONS:
        of = [_words(cell for cell in CELLS if cell[0] == situation and paths[cell] == path) for path in PATHS]
        rows.append(f"| {situation} | {' | '.join(of)} |\n".replace("|  |", "| |"))
    return head + "".join(rows)


def read() -> dict[Cell, str]:
    """What the page says of each cell; cells that it does not name are missing."""
    said = {}
    for line in PAGE.read_text().splitlines():
        columns = [column.strip() for column in line.strip("|").split(" |")]
        if columns[0] not in SITUATIONS:
            continue
        for path, column in zip(PATHS, columns[1:], strict=False):
            for part in filter(None, column.split(" + ")):
                limited = re.fullmatch(r"(.*) \(([a-z, ]+)\)", part)
                losses, reductions = (limited[1], limited[2].split(", ")) if limited else (part, REDUCTIONS)
                named = losses.removeprefix("all but ").split("; ")
                for loss in LOSSES:
                    if losses == "all" or (loss.name in named) != losses.startswith("all but "):
                        said.update({(columns[0], loss.name, reduction): path for reduction in reductions})
    return said


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(text({cell: path_of(cell) for cell in CELLS}))
