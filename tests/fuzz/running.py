"""Runs the calls of one seed after another, and says what was found."""

import argparse
import faulthandler
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def main(problems: Callable[[int], Iterable[str]]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, default=1 << 60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end, ran, found = time.monotonic() + options.seconds, 0, 0
    for seed in range(options.seed, options.seed + options.calls):
        if time.monotonic() > end or found == 20:
            break
        print(seed, end="\r", flush=True)  # a crash leaves its seed
        for problem in problems(seed):
            print(f"seed {seed}: {problem}", flush=True)
            found += 1
        ran += 1
    print(f"{ran} calls, {found} findings")
    return 1 if found else 0


def words(given: Any) -> str:
    if not isinstance(given, Tensor):
        return repr(given)[:60]
    if given.is_nested:
        return f"nested {given.dtype}"
    strides = "" if given.layout != torch.strided or given.is_contiguous() else f" strides {given.stride()}"
    return f"{str(given.dtype).removeprefix('torch.')}{tuple(given.shape)}{strides}"
