"""Processes that meet over gloo and run the same checks, and what they share."""

import datetime
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Relative to the largest value or gradient.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 * 1.5}
Sharding = dict[str, Any]
Check = Callable[[], None]


def cuts(classes: int) -> dict[str, list[int]]:
    """Where each rank's classes begin, and where the last one's end."""
    ranks = dist.get_world_size()
    chunk = -(-classes // ranks)
    even = [min(rank * chunk, classes) for rank in range(ranks + 1)]
    uneven = [0, *[classes - (ranks - rank) for rank in range(1, ranks)], classes]
    empty = [0, 0, *[classes] * (ranks - 1)]
    return {"even": even, "uneven": uneven, "empty": empty}


def mine(x: Tensor, ends: list[int]) -> Tensor:
    """A view into the logits of all classes, whose strides are those of all."""
    rank = dist.get_rank()
    return x.narrow(min(x.dim() - 1, 1), ends[rank], ends[rank + 1] - ends[rank])


def sharding(ends: list[int], cut: str = "") -> Sharding:
    start = {} if cut == "even" else {"vocab_start": ends[dist.get_rank()]}
    return {**start, "vocab_size": ends[-1]}


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def error(got: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Relative to the largest finite number of ``scale``."""
    got = got.detach()
    same = (got.double() == exact) | (got.isnan() & exact.isnan())
    largest = scale[scale.isfinite()].abs().max().clamp_min(1e-2) if scale.isfinite().any() else torch.ones(())
    off = torch.where(same, 0.0, (got.double() - exact).abs()) / largest
    return float(off.max().nan_to_num(nan=torch.inf)) if off.numel() else 0.0


LARGEST: dict[str, float] = {}
OFF: list[str] = []


def within(name: str, found: Tensor, exact: Tensor, scale: Tensor, limit: float) -> None:
    """Not raised at once, because the other ranks go on."""
    off = error(found, exact, scale)
    LARGEST[str(found.dtype)] = max(LARGEST.get(str(found.dtype), 0.0), off)
    if not off <= limit:
        OFF.append(f"{name}: off by {off:.1e}")


def same_bits(name: str, results: list[Tensor]) -> None:
    flat = torch.cat([each.double().flatten() for each in results]).nan_to_num(nan=12345.0)
    everywhere = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, flat)
    expect(all(torch.equal(each, flat) for each in everywhere), f"{name}: expected the same bits on every rank")


def raises(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    try:
        result = call()
    except Exception as error:
        expect(type(error) is kind and words in str(error), f"expected {kind.__name__}: {words}, got {error!r}")
    else:
        raise AssertionError(f"expected {kind.__name__}: {words}, got {result}")


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in str(func) and "wait" not in str(func):
            self.sent.append((str(func), args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


# ---- processes


def process(rank: int, ranks: int, folder: Path, checks: list[Check]) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)  # also on a busy machine
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=patience
    )
    failed = 0
    for check in checks:
        try:
            check()
            expect(not OFF, "\n".join(OFF))
        except Exception:
            failed += 1
            print(f"rank {rank} of {ranks}, {check.__name__}:\n{traceback.format_exc()}", flush=True)
        heard = torch.tensor([failed])
        dist.all_reduce(heard)
        if heard.item():
            break
    if rank == 0:
        print(f"largest errors, {ranks} ranks: {LARGEST}")
    dist.destroy_process_group()
    sys.exit(int(heard.item() > 0))


def main(checks: dict[str, Any], ranks: str, folder: str, *names: str) -> int:
    """Forks, so that torch is imported once."""
    number, wanted = int(ranks), [checks[name] for name in names]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank, number, Path(folder), wanted)) for rank in range(number)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    return max(abs(each.exitcode or 0) for each in processes)
