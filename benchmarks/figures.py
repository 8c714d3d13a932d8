"""Writes what a single program has measured, with the facts of the machine beside it, for ``benchmarks/report``."""

import argparse
import json
from pathlib import Path
from typing import Any

from . import machine


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON too")


def write(path: Path | None, figures: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine.facts("cpu"), "figures": figures}, indent=1) + "\n")
        print(f"written: {path}")
