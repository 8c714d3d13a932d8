"""The torch side of the CUDA kernels, on a device that the executor runs: all of it but time, streams and hardware."""

import os
import re
import subprocess
import sys
from pathlib import Path

import compiler
import executor
import executor_device
import pytest
from compiler import CSRC, ROOT, fingerprint
from executor_device import HERE, VARIABLE
from marks import needs_compiler
from plant import planted

pytestmark = [
    needs_compiler,
    pytest.mark.deep("the torch side of CUDA on the executor's device; a GPU runs the same tests", minutes=3),
]

FILES = (
    "accuracy/test_linear_accuracy.py",
    "compiled/test_linear_compiled.py",
    "contract/test_changed_inputs.py",
    "contract/test_deterministic.py",
    "contract/test_distillation.py",
    "contract/test_distillation_in_place.py",
    "contract/test_distillation_module.py",
    "contract/test_distillation_top_k.py",
    "contract/test_hostile_calls.py",
    "contract/test_linear.py",
    "contract/test_linear_distillation.py",
    "contract/test_linear_errors.py",
    "contract/test_linear_gradients.py",
    "contract/test_linear_halves.py",
    "contract/test_linear_module.py",
    "contract/test_linear_options.py",
    "contract/test_log_probs.py",
    "contract/test_margin_edges.py",
    "contract/test_options.py",
    "contract/test_pointwise_dtypes.py",
    "contract/test_row_sums.py",
    "contract/test_sample_weight.py",
    "contract/test_weighted_dtypes.py",
)
TESTS = ["tests/gpu", *(f"tests/{file}" for file in FILES), "-k", "not gradcheck and not sparse"]
# What is told from the result of a call: some losses of each family, reductions, layouts and dtypes.
FEW = ["tests/gpu/test_gpu.py", "-k", "float32 and (every_path or strided_views) and not focal"]

# {name: (file of csrc/torch/cuda, what stands there, what is put in its place)}
FAULTS = {
    "a workspace too small": ("common.cpp", "({kCudaWorkspaceBytes}", "({kCudaWorkspaceBytes >> 10}"),
    "a divisor read before it is written": (
        "softmax.cpp",
        "if (args.mean) check_launch(cuda_kernels_of(loss).divisor(loss.kernel(), args, call.stream));",
        "",
    ),
    "a wrong stride": ("softmax.cpp", "args.upstream_stride = read.stride;", "args.upstream_stride = 1;"),
}


@pytest.fixture(scope="session")
def device(kernels, once) -> Path:
    """The folder with the library and its objects."""
    tools = [Path(tool.__file__ or "") for tool in (executor_device, compiler)]
    name = fingerprint(" ".join(executor_device.flags()), CSRC, HERE, executor.HERE, *tools)
    return once(f"executor_device-{name}", lambda folder: executor_device.build(folder, Path(kernels._name).parent))


def run(library: Path, *tests: str) -> tuple[int, str]:
    """The exit status of pytest on the device, and what it printed."""
    command = [sys.executable, "-m", "pytest", "--device", executor_device.NAME, "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, VARIABLE: str(library), "PYTHONPATH": str(ROOT)}
    # A worker of pytest-xdist tells its own processes that they are workers too.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_suite_passes_on_the_executors_device(device, record_property):
    status, printed = run(device / executor_device.LIBRARY, *TESTS)
    assert status == 0, printed[-8000:]
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None and int(passed[1]) > 2400, printed[-2000:]
    record_property("passed", passed[1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_torch_side_of_cuda_is_caught(fault, device, kernels, tmp_path):
    file, old, new = FAULTS[fault]
    source = planted(tmp_path, f"torch/cuda/{file}", old, new)
    executor_device.build(tmp_path, Path(kernels._name).parent, source, device)
    status, printed = run(tmp_path / executor_device.LIBRARY, *FEW, "-x")
    # Memory behind a tensor may not be touched, which ends the process.
    assert (status == 1 and "FAILED" in printed) or "Segmentation fault" in printed, printed[-4000:]
