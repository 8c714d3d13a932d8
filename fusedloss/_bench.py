"""``python -m fusedloss bench --shape 4096,50257 --dtype bf16``: one loss at your own shape, beside torch's, here.

Both run in turn, so that what else the machine does slows both: the speed-up is the median of the rounds' ratios.
"""

import argparse
import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import functional
from ._library import extension, why_native
from ._route import explain

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def _classes(input: Tensor) -> Tensor:
    return torch.randint(input.shape[1], input.shape[:1] + input.shape[2:], device=input.device)


def _bits(input: Tensor) -> Tensor:
    return torch.randint(2, input.shape, device=input.device).to(input.dtype)


# What the target of a loss is made of; the others take numbers like the input's.
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": _classes,
    "nll_loss": _classes,
    "multi_margin_loss": _classes,
    "binary_cross_entropy_with_logits": _bits,
    "mse_loss": torch.randn_like,
    "l1_loss": torch.randn_like,
    "smooth_l1_loss": torch.randn_like,
    "huber_loss": torch.randn_like,
    "hinge_embedding_loss": lambda x: 2 * _bits(x) - 1,
    "soft_margin_loss": lambda x: 2 * _bits(x) - 1,
    "poisson_nll_loss": _bits,
}


def bench(arguments: list[str]) -> int:
    options = _parse(arguments)
    if extension is None:
        print(f"fusedloss runs natively here: {why_native}")
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    name, device = options.loss, options.device
    input = torch.randn(options.shape, device=device).to(DTYPES[options.dtype])
    if input.dim() == 1 and TARGETS[name] is _classes:
        raise SystemExit(f"{name} needs a shape of rows and classes, such as 4096,50257, got {tuple(input.shape)}")
    target = TARGETS[name](input)
    ours, theirs = getattr(functional, name), getattr(F, name)
    losses = {"torch": theirs, "fusedloss": ours}
    if options.compile:
        losses["torch.compile"] = torch.compile(theirs)
    input.requires_grad_()
    calls = {which: _step(loss, input, target) for which, loss in losses.items()}
    peaks = {which: peak_bytes(call, device) for which, call in calls.items()}  # the first call warms up
    times = _in_turn(calls, device, options.seconds)
    where = device if device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name} of {tuple(input.shape)} {options.dtype}, forward + backward of the mean, {where}")
    print(f"the call is {explain(ours, input, target)}")
    for which in losses:
        print(_line(which, times, peaks[which]))
    moved = 2 * input.nbytes + target.nbytes
    rate = moved / median(times["fusedloss"]) / 1e9
    print(f"at least {_size(moved)} have to move: input and target read, gradient written. That is {rate:.1f} GB/s")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fusedloss bench", description=__doc__)
    parser.add_argument("--shape", required=True, type=_shape, help="sizes with commas, the classes second")
    parser.add_argument("--loss", default="cross_entropy", choices=TARGETS, metavar="LOSS", help=", ".join(TARGETS))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="that torch may use on a CPU; otherwise as many as it takes")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to measure (default: 3)")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if not all(size > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"sizes must be positive, got {text}")
    return sizes


def _step(loss: Callable[..., Tensor], input: Tensor, target: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(input, target), input)


def _in_turn(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds a call: entry i of each was taken in round i."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    loops = {which: max(1, round(2e-3 / _timed(call, 3, wait))) for which, call in calls.items()}
    times: dict[str, list[float]] = {which: [] for which in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 5:
        for which, call in calls.items():
            times[which].append(_timed(call, loops[which], wait))
    return times


def _timed(call: Callable[[], object], loops: int, wait: Callable[[], None]) -> float:
    wait()
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    wait()
    return (time.perf_counter() - begin) / loops


def _line(which: str, times: dict[str, list[float]], peak: int) -> str:
    took = median(times[which])
    unit = f"{took * 1e3:9.2f} ms" if took >= 1e-4 else f"{took * 1e6:9.1f} us"
    line = f"  {which:14s}{unit}   peak {_size(peak):>9s}"
    if which == "fusedloss":
        ratios = [base / own for base, own in zip(times["torch"], times[which], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        line += f"   {median(ratios):.2f} times as fast as torch, half of the rounds from {low:.2f} to {high:.2f}"
    return line


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes held at once by torch's allocator for the device beyond what it held before.

    The result of the call counts, because it is alive until the call returns. Memory that other code takes from the
    system or the driver is not seen.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    return max(accumulate((size for _, size in changes), initial=0))
