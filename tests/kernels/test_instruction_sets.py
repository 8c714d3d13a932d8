"""Every instruction set passes the tests of values, and leaves no code that a lesser machine cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiler import COMPILER, CSRC
from losses import extension
from marks import needs_compiler, needs_extension

pytestmark = needs_extension
TESTS = Path(__file__).parent.parent
# The tests of values of each kind of driver: of the first two every pair of values, as the widest set ran every case.
OF_VALUES = [
    ["accuracy/test_values.py"],
    ["contract/test_distillation.py", "-k", "against_float64"],
    ["--deep", "contract/test_index_targets.py", "-k", "against_float64"],
    ["contract/test_row_sums.py", "-k", "against_float64"],
]
# One process for all: the import of torch takes as long as a hundred tests.
RUN = f"""
import sys, pytest
for tests in {OF_VALUES}:
    if status := pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]):
        sys.exit(status)
import fusedloss._library as library
print(library.extension.cpu_isa())
"""


def isas() -> list[str]:
    """The instruction sets compiled in, up to the one that this machine picks by itself."""
    if extension is None:
        return []
    compiled = extension.cpu_isas.split()
    return compiled[: compiled.index(extension.cpu_isa()) + 1]


@pytest.mark.deep("runs of the tests of values for each lesser instruction set; the widest one ran them", minutes=0.5)
@pytest.mark.parametrize("isa", isas()[:-1])
def test_every_lesser_instruction_set_passes_the_tests_of_values(isa):
    # In a process of its own: the choice is made once, at load.
    environment = {**os.environ, "FUSEDLOSS_CPU_ISA": isa}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, env=environment, cwd=TESTS, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.splitlines()[-1] == isa


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


@pytest.mark.deep("builds without optimisation that look for shared symbols; builds alone can show them")
@needs_compiler
def test_no_code_of_an_instruction_set_leaks_into_shared_symbols():
    # A weak symbol outside the instruction set's namespace (a standard template, say) could be the one copy the linker
    # keeps for all of them. Without optimisation nothing is inlined away. One set stands for all: they read one text.
    isa = "avx2"
    sources = sorted((CSRC / "cpu" / "isa").glob(f"{isa}*.cpp"))
    assert len(sources) == 5
    unit = "".join(f'#include "{source}"\n' for source in sources)
    # Assembly names the symbols, so that nothing need be assembled.
    command = [*COMPILER.split(), "-std=c++20", "-O0", "-fPIC", "-S", "-x", "c++", "-", "-o", "-"]
    assembly = subprocess.run(command, input=unit, capture_output=True, text=True, check=True).stdout
    weak = [line.split()[1] for line in assembly.splitlines() if line.startswith("\t.weak\t")]
    assert weak
    assert [name for name in weak if f"9fusedloss{len(isa)}{isa}" not in name] == []
