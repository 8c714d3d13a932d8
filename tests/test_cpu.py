"""What the CPU path promises: every instruction set, any number of threads, no code a lesser machine cannot run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LOSSES, ONE_OF_EACH, SOFTMAX, named, needs_extension, value_and_grad

from fusedloss._library import extension

pytestmark = needs_extension

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def isas() -> list[str]:
    """The instruction sets compiled in that this machine has: those up to the one it picks by itself."""
    if extension is None:
        return []
    compiled = extension.cpu_isas.split()
    best = run_python("import fusedloss._library as l; print(l.extension.cpu_isa())", FUSEDLOSS_CPU_ISA="").strip()
    return compiled[: compiled.index(best) + 1]


@pytest.mark.parametrize("isa", isas()[:-1])
def test_every_lesser_instruction_set_passes_the_value_tests(isa):
    # The whole grid, in a process of its own: the choice is made once, at load. This process runs it with the widest.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            os.path.join(os.path.dirname(__file__), "test_values.py"),
        ],
        env={**os.environ, "FUSEDLOSS_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (
        run_python("import fusedloss._library as l; print(l.extension.cpu_isa())", FUSEDLOSS_CPU_ISA=isa).strip() == isa
    )


def test_an_unknown_instruction_set_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import fusedloss"],
        env={**os.environ, "FUSEDLOSS_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode != 0 and "FUSEDLOSS_CPU_ISA: expected one of baseline" in done.stderr and "sse9" in done.stderr
    )


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler; the kernels were built elsewhere")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_code_of_an_instruction_set_leaks_into_shared_symbols(isa, tmp_path):
    # A weak symbol outside the instruction set's namespace (a standard template, say) could be the one copy the linker
    # keeps for all of them. Without optimisation nothing is inlined away.
    sources = sorted((ROOT / "csrc" / "cpu").glob(f"isa_{isa}*.cpp"))
    assert len(sources) == 4
    for source in sources:
        check_symbols(isa, source, tmp_path / "isa.o")


def check_symbols(isa: str, source: Path, object_file: Path) -> None:
    subprocess.run([COMPILER, "-std=c++20", "-O0", "-fPIC", "-c", str(source), "-o", str(object_file)], check=True)
    symbols = subprocess.run(["nm", str(object_file)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if line[17:18] in ("W", "V", "u")]
    assert weak
    # Mangled, since not every nm can read the name of a lambda within a lambda.
    assert [line for line in weak if f"9fusedloss{len(isa)}{isa}" not in line] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@named(LOSSES)
def test_one_and_two_threads_give_the_same_bits(loss, dtype):
    shapes = [(3000, 30), (300, 1000), (4, 21, 100, 100), (7, 50257)] if loss in SOFTMAX else [(1_000_003,), (70, 1000)]
    for shape in shapes:
        x, target = loss.data(shape, dtype)
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            results.append([value_and_grad(loss.fused, x, target, r)[:2] for r in ("mean", "sum", "none")])
            torch.set_num_threads(before)
        for other in results[1:]:
            for (value, grad), (other_value, other_grad) in zip(results[0], other, strict=True):
                assert torch.equal(value, other_value) and torch.equal(grad, other_grad)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts threads through /proc, which is Linux's")
@named([loss for loss in ONE_OF_EACH if loss.op != "nll"])  # which has next to no work
def test_work_is_spread_over_torchs_threads(loss):
    # CPU time of every thread of the process: on one thread alone, no other one's would grow.
    def cpu_times() -> dict[str, int]:
        times = {}
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                times[thread] = int(file.read().split()[0])
        return times

    shape = (2000, 1000) if loss in SOFTMAX else (4_000_000,)
    x, target = loss.data(shape, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    loss.fused(x, target, "mean")
    before = cpu_times()
    for _ in range(60):
        loss.fused(x, target, "mean")
    after = cpu_times()
    torch.set_num_threads(threads)
    grown = sorted(after[thread] - before.get(thread, 0) for thread in after)
    assert grown[-2] > 0.2 * grown[-1]


def test_memory_is_the_gradient_and_a_few_bytes_a_row():
    from torch.profiler import ProfilerActivity, profile

    x, target = LOSSES[0].data((512, 8000), torch.float32)
    x.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.autograd.grad(LOSSES[0].fused(x, target, "mean"), x)
    events = sorted(
        (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    assert x.nbytes <= peak <= 1.05 * x.nbytes
