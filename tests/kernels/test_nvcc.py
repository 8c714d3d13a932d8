"""What the compiler promises of the CUDA kernels, without a GPU: no warning, no local memory, known registers, and no
more instructions an element than the table has.

A spill or a register more can halve how many threads a multiprocessor holds, an instruction more can keep a kernel from
the memory's speed, and no comparison of values would see either.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import instruction_table
import nvcc
import pytest
from compiler import CSRC, fingerprint

from fusedloss import custom
from fusedloss.custom import _source

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc; tests/kernels runs the kernels without it"
)
needs_names = pytest.mark.skipif(
    shutil.which("c++filt") is None, reason="no c++filt; without it a kernel has not the name that the table knows"
)
needs_disassembler = pytest.mark.skipif(
    nvcc.disassembler() is None, reason="no nvdisasm; the committed instructions.txt stands (pip: nvidia-cuda-nvdisasm)"
)

# Each is named for what is wrong with it. What the stack holds is indexed by what only the device knows; of the values
# that must be read before the barrier and written after it, 32 registers hold not half.
PLANTED = """
__global__ void clean(float* x) { x[threadIdx.x] *= 2; }

__global__ void stack(const int* index, float* x) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[i * 32 + threadIdx.x];
  for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = values[index[i * 32 + threadIdx.x] & 63];
}

__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = values[63 - i];
}
"""
# One of the device compiler, and one that only the host compiler gives, after ptxas has written all it has to say.
WARNINGS = {
    'variable "unused" was declared': "__global__ void warns(float* x) { int unused; x[0] = 1; }\n",
    "-Werror=sign-compare": (
        "__global__ void clean(float* x) { x[0] = 1; }\nbool warns(int a, unsigned b) { return a < b; }\n"
    ),
}


def kept_table() -> bool:
    """Whether the committed table is what this nvcc said of these very sources, without a warning or a spill."""
    counted_by, sources, _ = nvcc.read_table(nvcc.TABLE.read_text())
    return (counted_by, sources) == (nvcc.version(), nvcc.fingerprint())


@pytest.fixture(scope="session")
def nvcc_runs(once):
    if kept_table():
        pytest.skip("the tables are what this nvcc said of these very sources; nvcc.py compiles them all the same")

    def make(folder: Path) -> None:
        runs = nvcc.compile(nvcc.SOURCES, nvcc.supported(), counting=nvcc.disassembler() is not None)
        (folder / "runs.json").write_text(json.dumps([dataclasses.asdict(run) for run in runs]))

    # Ten minutes of a core: for all workers once.
    command = " ".join([nvcc.version(), *nvcc.FLAGS, *nvcc.supported(), nvcc.fingerprint(), str(nvcc.disassembler())])
    folder = once(f"nvcc-{fingerprint(command, CSRC)}", make)
    return [nvcc.Run(**run) for run in json.loads((folder / "runs.json").read_text())]


@pytest.fixture(params=nvcc.ARCHITECTURES)
def architecture(request):
    if request.param not in nvcc.supported():
        pytest.skip(f"nvcc {nvcc.version()} does not know {request.param}")
    return request.param


def planted(folder: Path, source: str, architecture: str):
    file = folder / "planted.cu"
    file.write_text(source)
    return nvcc.compile([file], [architecture])


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
def test_no_kernel_uses_local_memory(nvcc_runs, architecture):
    # Nor does any give a warning: reading the functions of a run that failed, fails with what the compiler said.
    offenders = nvcc.using_local_memory(nvcc.functions(nvcc_runs, architecture))
    assert not offenders, f"on {architecture}:\n" + "\n".join(map(str, offenders))


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
@needs_names
def test_the_table_has_every_kernel_and_no_other(nvcc_runs, architecture):
    *_, committed = nvcc.read_table(nvcc.TABLE.read_text())
    found = nvcc.registers({architecture: nvcc.functions(nvcc_runs, architecture)})
    message = nvcc.differences(dict.fromkeys(committed, "there"), dict.fromkeys(found, "there"))
    assert not message, message


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
@needs_names
def test_registers_are_those_of_the_table(nvcc_runs):
    counted_by, _, committed = nvcc.read_table(nvcc.TABLE.read_text())
    if counted_by != nvcc.version():
        pytest.skip(
            f"tests/kernels/registers.txt is by nvcc {counted_by}, this is {nvcc.version()}, which may count otherwise"
        )
    found = nvcc.registers({name: nvcc.functions(nvcc_runs, name) for name in nvcc.ARCHITECTURES})
    message = nvcc.differences(committed, found)
    assert not message, message


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
@needs_names
@needs_disassembler
def test_instructions_are_those_of_the_table(nvcc_runs):
    counted_by, *_ = nvcc.read_table(nvcc.TABLE.read_text())
    if counted_by != nvcc.version():
        pytest.skip(f"instructions.txt is by nvcc {counted_by}, this is {nvcc.version()}, which may compile otherwise")
    committed = instruction_table.read(instruction_table.TABLE.read_text())
    found = nvcc.counts(nvcc_runs, nvcc.ARCHITECTURES)
    message = nvcc.differences(instruction_table.flattened(committed), instruction_table.flattened(found))
    assert not message, message


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
def test_a_loss_of_ones_own_uses_no_local_memory(tmp_path):
    expression = "log_cosh(x - t) + tanh(x) * sinh(t)"
    units = _source.of_elements(_source.functor(custom._trees(expression, None, {}), {}), "", True)
    files = [tmp_path / name for name in ("cuda.cu", "indexed.cu")]
    for file in files:
        file.write_text(units[file.name])
    architecture = nvcc.supported()[0]
    functions = nvcc.functions(nvcc.compile(files, [architecture]), architecture)
    assert any("Expression" in function.name for function in functions) and not nvcc.using_local_memory(functions)


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
def test_planted_local_memory_is_found(architecture, tmp_path):
    functions = nvcc.functions(planted(tmp_path, PLANTED, architecture), architecture)
    assert sorted(function.name for function in functions) == ["clean", "spills", "stack"]
    found = {function.name: function for function in nvcc.using_local_memory(functions)}
    assert sorted(found) == ["spills", "stack"]
    assert found["stack"].stack >= 4 * 64
    assert found["spills"].registers == 32 and found["spills"].spill_stores > 0 and found["spills"].spill_loads > 0


@needs_nvcc
@pytest.mark.deep("what nvcc says of the kernels; they ran on the CPU")
@pytest.mark.parametrize("said", WARNINGS)
def test_a_planted_warning_fails_with_what_the_compiler_said(said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        nvcc.functions(planted(tmp_path, WARNINGS[said], nvcc.supported()[0]), nvcc.supported()[0])
