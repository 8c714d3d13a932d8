"""What `import fusedloss` costs beside `import torch`, and what it does to Python's garbage collector."""

import gc
import os
import statistics
import subprocess
import sys

import pytest
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

from fusedloss._collector import paused

pytestmark = on_cpu_alone("another process")
MOST = 0.1  # seconds


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_an_import_that_fails_too(enabled, monkeypatch):
    switched = []
    monkeypatch.setattr(gc, "isenabled", lambda: enabled)
    monkeypatch.setattr(gc, "disable", lambda: switched.append(False))
    monkeypatch.setattr(gc, "enable", lambda: switched.append(True))
    with pytest.raises(ImportError), paused():
        raise ImportError
    assert switched == ([False, True] if enabled else [False])


# Processor time, which other processes change little. Forks, as an import of torch takes thirty times as long.
TIMED = """
import os, time, torch
for _ in range(9):
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        start = time.process_time()
        import fusedloss
        print(time.process_time() - start, flush=True)
        os._exit(0)
"""


@needs_extension
@pytest.mark.deep("imports in processes of their own, timed; every test imports the package")
def test_an_import_takes_little_beside_torchs():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(3):  # a machine under load is tried again
        run = subprocess.run(
            [sys.executable, "-c", TIMED], env=environment, cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        times = [float(line) for line in run.stdout.split()]
        assert len(times) == 9
        ours = statistics.median(times)
        if ours < MOST:
            return
    raise AssertionError(f"expected an import of less than {MOST} s of a core, got {ours:.3f}")
