"""Where memory ends, a call raises and leaves everything as it was."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compiler import COMPILER, ROOT, WITHOUT_PRELOAD, fingerprint
from marks import needs_compiler, needs_extension, on_cpu_alone

HERE = Path(__file__).parent
ALLOCATOR = HERE / "failing_malloc.cpp"
pytestmark = [
    needs_extension,
    needs_compiler,
    on_cpu_alone("a GPU's memory is torch's, which raises before a kernel is launched"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="stands in for glibc's malloc"),
]


def failures(once: Callable[[str, Callable[[Path], None]], Path], *words: str) -> int:
    """How many allocations failed, each in a step of its own, of the calls with these words in their names."""

    def build(folder: Path) -> None:
        command = [*COMPILER.split(), "-O1", "-shared", "-fPIC", str(ALLOCATOR), "-o", str(folder / "malloc.so")]
        subprocess.run(command, check=True)

    library = once(f"malloc-{fingerprint('', ALLOCATOR)}", build) / "malloc.so"
    environment = {
        **WITHOUT_PRELOAD, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE.parent)]),
        "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    command = [sys.executable, "-X", "faulthandler", str(HERE / "short_of_memory.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return int(done.stdout)


def test_some_losses_that_run_out_of_memory(once):
    assert failures(once, "in place") >= 20


@pytest.mark.deep("every large allocation of every loss fails in turn; those of losses over their logits did")
def test_every_loss_that_runs_out_of_memory(once):
    assert failures(once) >= 400
