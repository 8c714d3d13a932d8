"""CPU time and memory of a loss over a sharded vocabulary, beside torch's: ``python -m benchmarks.sharded``.

Two processes over gloo, of one thread each, take steps of both in turn. CPU time is that of a process and all its
threads, so that it does not depend on who else has the cores.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from tabulate import tabulate  # type: ignore[import-untyped]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from fusedloss import parallel
from fusedloss._bench import peak_bytes
from fusedloss._library import extension as extension

from .figures import add_output, write

OURS, TORCHS = "fusedloss.parallel", "loss_parallel"
TIMES_LESS_CPU, SHARE_OF_MEMORY = 4, 1 / 3  # the goals


class Figures(NamedTuple):
    """Of a step of forward and backward on each rank."""

    cpu_ms: float  # the median
    peak: int  # bytes beyond the logits


def steps(rows: int, classes: int) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(logits, mesh, [Shard(1)])
    everywhere = distribute_tensor(target, mesh, [Replicate()])
    mine = sharded.to_local().clone().requires_grad_()
    sharded.requires_grad_()

    def ours() -> None:
        mine.grad = None
        parallel.cross_entropy(mine, target, vocab_size=classes).backward()

    def torchs() -> None:
        sharded.grad = None
        with loss_parallel():
            torch.nn.functional.cross_entropy(sharded, everywhere).backward()

    return {OURS: ours, TORCHS: torchs}


def measured(rows: int, classes: int, rounds: int) -> dict[str, Figures]:
    both = steps(rows, classes)
    times: dict[str, list[float]] = {name: [] for name in both}
    for number in range(rounds + 2):  # two to warm up
        for name, step in both.items():
            dist.barrier()
            start = time.process_time()
            step()
            if number >= 2:
                times[name].append(time.process_time() - start)
    return {name: Figures(1e3 * statistics.median(times[name]), peak_bytes(step)) for name, step in both.items()}


def process(
    rank: int, ranks: int, meeting: str, sizes: tuple[int, int, int], results: "multiprocessing.Queue[object]"
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    figures = measured(*sizes)
    if rank == 0:
        results.put({name: tuple(each) for name, each in figures.items()})
    dist.destroy_process_group()


def run(rows: int = 512, classes: int = 32_000, ranks: int = 2, rounds: int = 15) -> dict[str, Figures]:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[object] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/meeting", (rows, classes, rounds), results)
        processes = [context.Process(target=process, args=(rank, *arguments)) for rank in range(ranks)]
        for each in processes:
            each.start()
        found = results.get(timeout=300)
        for each in processes:
            each.join()
    return {name: Figures(*each) for name, each in found.items()}  # type: ignore[attr-defined]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=32_000, help="of all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--enforce", action="store_true", help="fail where a goal is not met")
    add_output(parser)
    options = parser.parse_args(arguments)
    figures = run(options.rows, options.classes, options.ranks, options.rounds)
    print(f"({options.rows}, {options.classes}) float32 over {options.ranks} processes, a step of a rank:")
    table = [(name, f"{each.cpu_ms:.1f}", f"{each.peak / 1e6:.1f}") for name, each in figures.items()]
    print(tabulate(table, headers=("", "CPU ms", "MB beyond the logits"), disable_numparse=True, tablefmt="github"))
    ours, torchs = figures[OURS], figures[TORCHS]
    print(f"{torchs.cpu_ms / ours.cpu_ms:.1f} times less CPU time, {ours.peak / torchs.peak:.2f} of the memory")
    sizes = {name: getattr(options, name) for name in ("rows", "classes", "ranks")}
    write(options.output, {**sizes, "sides": {name: each._asdict() for name, each in figures.items()}})
    met = torchs.cpu_ms >= TIMES_LESS_CPU * ours.cpu_ms and ours.peak <= SHARE_OF_MEMORY * torchs.peak
    if options.enforce and not met:
        goals = f"{TIMES_LESS_CPU} times less CPU time and {SHARE_OF_MEMORY:.2f} of the memory"
        print(f"goals not met: {goals}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
