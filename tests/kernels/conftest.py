"""The CUDA kernels, built for the CPU once for all workers and runs."""

import ctypes
from pathlib import Path

import compiler
import executor
import plant
import pytest
from compiler import CSRC, fingerprint


@pytest.fixture(scope="session")
def kernels(once) -> ctypes.CDLL:
    # The tools too, which say what is built and edit the sources.
    tools = [Path(tool.__file__ or "") for tool in (executor, compiler, plant)]
    name = fingerprint(" ".join(executor.FLAGS), CSRC, executor.HERE, *tools)
    return executor.loaded(once(f"cuda_on_cpu-{name}", executor.build))
