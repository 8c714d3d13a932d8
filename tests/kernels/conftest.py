"""The CUDA kernels, built for the CPU once for all workers and runs."""

import ctypes
from pathlib import Path

import executor
import plant
import pytest
from plant import CSRC, fingerprint


@pytest.fixture(scope="session")
def kernels(once) -> ctypes.CDLL:
    # The tools too: one says what is built, the other edits the sources.
    tools = [Path(executor.__file__), Path(plant.__file__)]
    name = fingerprint(" ".join(executor.FLAGS), CSRC, executor.HERE, *tools)
    return executor.loaded(once(f"cuda_on_cpu-{name}", executor.build))
