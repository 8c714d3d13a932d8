"""What the compiler promises of the CUDA kernels, without a GPU: no warning, no local memory, known registers.

A spill or a register more can halve how many threads a multiprocessor holds, and no comparison of values would see it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import nvcc
import pytest
from conftest import KERNELS_BY_NVCC

from fusedloss import custom

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc; tests/cuda_on_cpu runs the kernels without it"
)
needs_names = pytest.mark.skipif(
    shutil.which("c++filt") is None, reason="no c++filt; without it a kernel has not the name that the table knows"
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


@pytest.fixture(scope="session")
def nvcc_runs(pytestconfig):
    started = pytestconfig.stash.get(KERNELS_BY_NVCC, None)
    runs = started.result() if started else nvcc.compile(nvcc.SOURCES, nvcc.ARCHITECTURES)
    return {architecture: runs[architecture] for architecture in nvcc.supported()}


@pytest.fixture(params=nvcc.ARCHITECTURES)
def architecture(request):
    if request.param not in nvcc.supported():
        pytest.skip(f"nvcc {nvcc.version()} does not know {request.param}")
    return request.param


def planted(folder: Path, source: str, architecture: str):
    file = folder / "planted.cu"
    file.write_text(source)
    return nvcc.compile([file], [architecture])[architecture]


def using_local_memory(functions):
    return [function for function in functions if function.uses_local_memory]


def differences(committed: Mapping[str, object], found: Mapping[str, object]) -> str:
    """A line for each kernel that is not as in the table, and how to write the table anew; empty where all are."""
    names = sorted(committed.keys() | found.keys())
    lines = [
        f"{name}: {committed.get(name, 'not there')} in the table, {found.get(name, 'not there')} now"
        for name in names
        if committed.get(name) != found.get(name)
    ]
    how = ["", f"{', '.join(nvcc.ARCHITECTURES)}; to accept: python tests/nvcc.py --write"]
    return "\n".join(lines + how) if lines else ""


@needs_nvcc
def test_no_kernel_uses_local_memory(nvcc_runs, architecture):
    # Nor does any give a warning: reading the functions of a run that failed, fails with what the compiler said.
    offenders = using_local_memory(nvcc.functions(nvcc_runs[architecture]))
    assert not offenders, f"on {architecture}:\n" + "\n".join(map(str, offenders))


@needs_nvcc
@needs_names
def test_the_table_has_every_kernel_and_no_other(nvcc_runs, architecture):
    _, committed = nvcc.read_table(nvcc.TABLE.read_text())
    found = nvcc.registers({architecture: nvcc.functions(nvcc_runs[architecture])})
    message = differences(dict.fromkeys(committed, "there"), dict.fromkeys(found, "there"))
    assert not message, message


@needs_nvcc
@needs_names
def test_registers_are_those_of_the_table(nvcc_runs):
    counted_by, committed = nvcc.read_table(nvcc.TABLE.read_text())
    if counted_by != nvcc.version():
        pytest.skip(f"tests/registers.txt is by nvcc {counted_by}, this is {nvcc.version()}, which may count otherwise")
    found = nvcc.registers({architecture: nvcc.functions(of) for architecture, of in nvcc_runs.items()})
    message = differences(committed, found)
    assert not message, message


@needs_nvcc
def test_a_loss_of_ones_own_uses_no_local_memory(tmp_path):
    expression = "log_cosh(x - t) + tanh(x) * sinh(t)"
    file = tmp_path / "custom.cu"
    file.write_text(custom._ON_CUDA.format(functor=custom._functor(custom._trees(expression, None, {}), {})))
    architecture = nvcc.supported()[0]
    functions = nvcc.functions(nvcc.compile([file], [architecture])[architecture])
    assert any("Expression" in function.name for function in functions) and not using_local_memory(functions)


@needs_nvcc
def test_planted_local_memory_is_found(architecture, tmp_path):
    functions = nvcc.functions(planted(tmp_path, PLANTED, architecture))
    assert sorted(function.name for function in functions) == ["clean", "spills", "stack"]
    found = {function.name: function for function in using_local_memory(functions)}
    assert sorted(found) == ["spills", "stack"]
    assert found["stack"].stack >= 4 * 64
    assert found["spills"].registers == 32 and found["spills"].spill_stores > 0 and found["spills"].spill_loads > 0


@needs_nvcc
@pytest.mark.parametrize("said", WARNINGS)
def test_a_planted_warning_fails_with_what_the_compiler_said(said, tmp_path):
    with pytest.raises(AssertionError, match=said):
        nvcc.functions(planted(tmp_path, WARNINGS[said], nvcc.supported()[0]))


def test_a_log_of_unknown_wording_is_refused():
    log = (
        "ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z5cleanPf\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 10 registers, used 0 barriers\n"
    )
    assert [function.registers for function in nvcc.parse(log)] == [10]
    for other in ("", log.replace("spill loads", "reloads"), log.replace("Used", "Uses")):
        with pytest.raises(AssertionError, match="not understood"):
            nvcc.parse(other)


def test_names_are_shortened():
    space = "fusedloss::cuda::(anonymous namespace)::"
    names = {
        f"void {space}forward_rows<fusedloss::cuda::bf16, fusedloss::cuda::CrossEntropy<float>, true>"
        "(fusedloss::cuda::CrossEntropy<float>, fusedloss::CudaSoftmaxArgs)": (
            "forward_rows<bf16, CrossEntropy<float>, true>"
        ),
        f"void {space}pointwise_kernel<(fusedloss::PointwiseResult)3, float, A<B<float> > >(A<B<float> >)": (
            "pointwise_kernel<Grad, float, A<B<float>>>"
        ),
        "clean(float*)": "clean",
    }
    assert [nvcc.shortened(name) for name in names] == list(names.values())


def test_a_table_that_differs_is_shown():
    counts = {"a<float, true>": (30, 31, 32), "b": (100, 101, 102)}
    counted_by, committed = nvcc.read_table(nvcc.table("13.0.88", counts))
    assert counted_by == "13.0.88" and committed == counts and not differences(committed, counts)
    message = differences(committed, {"a<float, true>": (30, 31, 33), "c": (1, 2, 3)})
    assert message.splitlines()[:3] == [
        "a<float, true>: (30, 31, 32) in the table, (30, 31, 33) now",
        "b: (100, 101, 102) in the table, not there now",
        "c: not there in the table, (1, 2, 3) now",
    ]
    assert "python tests/nvcc.py --write" in message
