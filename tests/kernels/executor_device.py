"""Builds the extension for the executor's device, and loads it: torch.device("executor") with fusedloss's ops on it."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runpy import run_path
from types import ModuleType

from compiler import COMPILER, CSRC, ROOT, WITHOUT_PRELOAD, precompiled

NAME = "executor"
LIBRARY = "_C.so"
VARIABLE = "FUSEDLOSS_EXECUTOR_DEVICE"  # where the library is
HERE = Path(__file__).parent / "executor_device"

FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
MACROS = {
    "TORCH_EXTENSION_NAME": "_C",
    "FUSEDLOSS_CUDA": "1",
    "FUSEDLOSS_CUDA_RUNTIME": '"executor_device.h"',
    "FUSEDLOSS_CUDA_ARCHITECTURES": f'"{NAME}"',
    "FUSEDLOSS_COMPILE_FLAGS": '""',
}
TORCH = "".join(
    f"#include <{name}>\n"
    for name in (
        "torch/csrc/utils/pybind.h", "torch/library.h", "torch/csrc/autograd/VariableTypeUtils.h",
        "torch/csrc/Exceptions.h",
    )
)  # fmt: skip
# A CPU's kernels of the one instruction set that needs no flags: tests of the device compare with torch.
ONE_INSTRUCTION_SET = "#include <cstdlib>\n#include <stdexcept>\n#include <string>\n#undef __x86_64__\n"


def flags() -> list[str]:
    import sysconfig

    import torch
    from torch.utils.cpp_extension import include_paths

    macros = [f"-D{name}={value}" for name, value in MACROS.items()]
    macros.append(f'-DFUSEDLOSS_TORCH_VERSION="{torch.__version__}"')  # without which it is not loaded
    folders = [*include_paths("cpu"), sysconfig.get_paths()["include"]]
    return [*FLAGS, *macros, f"-I{HERE}", *(flag for path in folders for flag in ("-isystem", path))]


def build(folder: Path, kernels: Path, source: Path = CSRC, built: Path | None = None) -> None:
    """The library, from these sources and the objects of the CUDA kernels that the executor has.

    `built` is a folder that has all objects: only csrc/torch/cuda is then compiled.
    """
    headers = precompiled((built or folder) / "torch.h", TORCH, flags())
    slopes = run_path(str(ROOT / "fusedloss" / "_torchs_slopes.py"))["flags"]()

    def compile(name: str) -> Path:
        to = folder / f"{name}.o"
        of_kernels = name.startswith(("baseline", "dispatch"))
        given = [*FLAGS, *slopes, "-Wno-unknown-pragmas"] if of_kernels else [*flags(), *headers]
        command = [*COMPILER.split(), *given, "-c", str(to.with_suffix(".cpp")), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True, env=WITHOUT_PRELOAD)
        assert done.returncode == 0, done.stderr
        return to

    units = units_of(source)
    if built:
        units = {"cuda": units["cuda"]}
    for name, text in units.items():
        (folder / f"{name}.cpp").write_text(text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, units))
    objects += [file for file in (built or folder).glob("*.o") if file.stem not in units]
    objects += kernels.glob("*.o")
    command = [*COMPILER.split(), "-shared", *map(str, objects), *libraries(), "-o", str(folder / LIBRARY)]
    subprocess.run(command, check=True, env=WITHOUT_PRELOAD)


def libraries() -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    names = ("c10", "torch_cpu", "torch", "torch_python")
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", *(f"-l{name}" for name in names)]


def units_of(source: Path) -> dict[str, str]:
    """What is compiled, most of it first: {name: text}."""

    def including(files: list[Path]) -> str:
        return "".join(f'#include "{file}"\n' for file in files)

    torch_side = sorted((source / "torch").glob("*.cpp")) + sorted((source / "torch" / "cpu").glob("*.cpp"))
    pointwise = [file for file in torch_side if file.name.startswith("pointwise")]
    kernels = {file.stem: including([file]) for file in sorted((source / "cpu" / "isa").glob("baseline*.cpp"))}
    return {
        "others": including([file for file in torch_side if file not in pointwise]),
        "pointwise_torch": including(pointwise),
        "cuda": including(sorted((source / "torch" / "cuda").glob("*.cpp"))),
        "device": including([HERE / "device.cpp"]),
        **kernels,
        "dispatch": ONE_INSTRUCTION_SET + including([source / "cpu" / "dispatch.cpp"]),
    }


def load(library: Path) -> None:
    """In place of the extension: before fusedloss is imported."""
    import torch

    torch.utils.rename_privateuse1_backend(NAME)
    spec = importlib.util.spec_from_file_location("fusedloss._C", library)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["fusedloss._C"] = extension
    torch._register_device_module(NAME, module(ctypes.CDLL(str(library))))
    # fusedloss finds the key by the device's name.
    torch._C.DispatchKey.AutogradEXECUTOR = torch._C.DispatchKey.AutogradPrivateUse1  # type: ignore[attr-defined]


def module(library: ctypes.CDLL) -> ModuleType:
    """torch.executor: what torch and the tests ask of it, as they ask torch.cuda."""
    import torch

    library.spoilt.restype = ctypes.c_int64
    # As executor.pretend: so small that little data reaches every threshold.
    library.pretend(ctypes.c_uint64(0), 2, 227 << 10, 1)

    def synchronize(device: object = None) -> None:
        spoilt = library.spoilt()
        assert spoilt == 0, f"{spoilt} tensors were freed with something written beside them"

    device = ModuleType(f"torch.{NAME}")
    device.__dict__.update(
        synchronize=synchronize,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,  # kDevices
        current_device=torch._C._accelerator_getDeviceIndex,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        device=lambda device: torch.accelerator.device_index(getattr(device, "index", device)),
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,  # the CPU's generator serves it
    )
    return device
