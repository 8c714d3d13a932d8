"""Builds fusedloss._C where there is a C++ compiler; installs the pure Python package where there is none."""

import os
import shutil
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths
except ImportError as error:
    raise SystemExit(
        f"fusedloss is built against the torch it will run with, and that is missing here ({error}).\n"
        "Install the build requirements, then build without isolation:\n"
        "    pip install torch setuptools wheel ninja pybind11 numpy\n"
        "    pip install --no-build-isolation ."
    ) from None

HERE = Path(__file__).parent


def extensions():
    if os.environ.get("FUSEDLOSS_NO_EXTENSION") == "1" or shutil.which(get_cxx_compiler().split()[0]) is None:
        print("fusedloss: no C++ compiler, or FUSEDLOSS_NO_EXTENSION=1: installing without kernels (native PyTorch)")
        return []
    sources = [
        str(path.relative_to(HERE)) for folder in ("cpu", "torch") for path in (HERE / "csrc" / folder).glob("*.cpp")
    ]
    headers = [str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*") if path.suffix in (".h", ".inl")]
    macros = [("FUSEDLOSS_TORCH_VERSION", f'"{torch.__version__}"'), ("FUSEDLOSS_CUDA_ARCHITECTURES", '"none"')]
    # -fno-trapping-math and -fno-math-errno let comparisons and selects become vector code; no rounding changes.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # As system headers, torch's own do not warn: every warning is about this project.
    flags += [flag for path in include_paths() for flag in ("-isystem", path)]
    return [
        CppExtension(
            "fusedloss._C", sorted(sources), depends=headers, define_macros=macros, extra_compile_args={"cxx": flags}
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
