"""What a loss over a sharded vocabulary sends on 8 to 512 ranks: ``python -m benchmarks.sharded_scale``.

Nothing is run. The figures of fusedloss come from the functions by which it chooses its collectives, the others'
from the rounds that their sources have (docs/parallel.md), as collectives in a ring. An all_gather of B bytes from each
of P ranks brings each rank B (P - 1) bytes in P - 1 messages, an all_reduce of B bytes 2 B (P - 1) / P in 2 (P - 1).
"""

import argparse
import sys
from typing import NamedTuple

import torch
from tabulate import tabulate  # type: ignore[import-untyped]

from fusedloss.parallel import _exchange
from fusedloss.parallel._row import Asked
from fusedloss.parallel._shards import HEAD

from .figures import add_output, write

FLOAT = torch.float32.itemsize
RANKS = (8, 16, 32, 64, 128, 256, 512)


class Step(NamedTuple):
    """Of one rank."""

    rounds: int  # waited for one after the other
    messages: int  # received
    bytes: int  # received
    held: int  # bytes of the rows' numbers at once


def ours(rows: int, ranks: int, asked: Asked = Asked()) -> Step:
    row_bytes, head = asked.numbers * FLOAT, HEAD * FLOAT * (ranks - 1)
    blocks = _exchange.in_blocks(row_bytes, rows, ranks)
    received = _exchange.received(row_bytes, rows, ranks, blocks) + head
    # In blocks: those of one block from all ranks, and the combined ones; otherwise those of all ranks.
    held = 2 * row_bytes * rows if blocks else row_bytes * rows * ranks
    rounds = 2 if blocks else 1
    return Step(rounds, rounds * (ranks - 1), received, held)


def gathered(rows: int, ranks: int, numbers: int) -> Step:
    """One all_gather of so many numbers a row."""
    return Step(1, ranks - 1, numbers * FLOAT * rows * (ranks - 1), numbers * FLOAT * rows * ranks)


def reduced(rows: int, ranks: int, rounds: int) -> Step:
    """So many all_reduces of a number a row."""
    return Step(
        rounds, rounds * 2 * (ranks - 1), rounds * 2 * FLOAT * rows * (ranks - 1) // ranks, rounds * FLOAT * rows
    )


PEERS = {
    "Transformer Engine": lambda rows, ranks: gathered(rows, ranks, 3),
    "Megatron-LM, CCE, TorchTitan, loss_parallel": lambda rows, ranks: reduced(rows, ranks, 3),
    "Liger": lambda rows, ranks: reduced(rows, ranks, 4),
}


HEAD_OF_TABLE = ["ranks", "", "rounds", "messages", "MB received", "MB of numbers held", "MB of logits, bfloat16"]


def lines(rows: int, classes: int, ranks: tuple[int, ...] = RANKS) -> list[list[str]]:
    found = []
    for number in ranks:
        shard = rows * -(-classes // number) * torch.bfloat16.itemsize
        steps = {"fusedloss": ours(rows, number)} | {name: make(rows, number) for name, make in PEERS.items()}
        for name, step in steps.items():
            sizes = (f"{each / 1e6:.1f}" for each in (step.bytes, step.held, shard))
            found.append([str(number), name, str(step.rounds), str(step.messages), *sizes])
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--classes", type=int, default=262_144)
    add_output(parser)
    options = parser.parse_args(arguments)
    print(f"{options.rows} rows of {options.classes} classes, a step of one rank:")
    found = lines(options.rows, options.classes)
    print(tabulate(found, headers=HEAD_OF_TABLE, disable_numparse=True, tablefmt="github"))
    write(options.output, {"rows": options.rows, "classes": options.classes, "head": HEAD_OF_TABLE, "lines": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
