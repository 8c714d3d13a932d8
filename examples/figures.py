"""What an example has measured as a file, for the tables and pictures of the documents (make report)."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON too")


def write(path: Path | None, figures: Any) -> None:
    if path is not None:
        # The clone comes before other packages now, and not earlier: fusedloss may be installed, and not built here.
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from benchmarks.figures import write as write_with_machine

        write_with_machine(path, figures)
