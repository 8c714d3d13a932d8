"""Writes the marked blocks of README.md and docs/*.md, and the pictures in docs/, from benchmarks/results.

``--check`` writes nothing, and fails where a document or a picture is not what the committed files say.
"""

import argparse
import sys
from pathlib import Path

from ..table import RESULTS, ROOT
from . import cpu, gpu, pictures, programs
from .committed import Block, Committed
from .documents import names, rewritten

BLOCKS: dict[str, Block] = {
    "six cases": cpu.six,
    "cpu tables": cpu.tables,
    "linear losses": cpu.linear,
    "small calls": cpu.calls,
    "own losses": cpu.own_losses,
    "crossover": cpu.crossover,
    "gpu sentence": gpu.sentence,
    "gpu summary": gpu.summary,
    "gpu linear losses": gpu.linear,
    "gpu tables": gpu.tables,
    "demo": programs.demo,
    "transformers trainer": programs.trainer,
    "distillation": programs.distillation,
    "adoption": programs.adoption,
    "sharded": programs.sharded,
    "sharded scale": programs.sharded_scale,
    "linear memory": programs.linear_memory,
    "linear digits": programs.linear_digits,
    "pages": programs.pages,
}
PICTURES: dict[str, Block] = {
    "speed": pictures.speed,
    "bandwidth": pictures.bandwidth,
    "memory": pictures.memory,
    "crossover": pictures.crossover,
    "step": pictures.step,
}


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted(root.glob("docs/*.md"))]


def made(root: Path, results: Path) -> dict[Path, str]:
    """Every document and picture as the results have it."""
    committed = Committed(results)
    text_of = {name: text(committed) for name, text in BLOCKS.items()}
    written = {path: path.read_text() for path in documents(root)}
    shown = {name for text in written.values() for name in names(text)}
    if unused := set(BLOCKS) - shown:
        raise ValueError(f"expected every block in a document, found none named {', '.join(sorted(unused))}")
    drawn = {root / "docs" / f"{name}.svg": draw(committed) for name, draw in PICTURES.items()}
    return {path: rewritten(text, text_of) for path, text in written.items()} | drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where anything would change")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of result files")
    options = parser.parse_args(arguments)
    changed = {
        path: text
        for path, text in made(options.root, options.results).items()
        if not path.exists() or path.read_text() != text
    }
    for path, text in changed.items():
        told = path.relative_to(options.root)
        if options.check:
            print(f"{told} is not what benchmarks/results says: make report", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"written: {told}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
