"""The compilation of a custom loss: the compiler's call, and the address of the result."""

import ctypes
import hashlib
import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._library import extension, why_native
from ._architectures import listed
from ._cache import cached
from ._source import Units, of_elements


def _sources() -> Path:
    """The folder of the C++ sources: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def library(
    op: str, functor: str, name: str, units_of: Callable[[str, str, bool], Units] = of_elements
) -> tuple[int | None, str]:
    """The address of the compiled loss, or None and why it cannot be compiled here.

    Raises:
        RuntimeError: the compiler refuses it.
    """
    from torch.utils import cpp_extension

    if extension is None:
        return None, why_native
    if why := _why_not(cpp_extension.get_cxx_compiler().split()[0]):
        return _natively(name, why)
    isa = extension.cpu_isa()
    architectures = _cuda_architectures()
    target = "" if isa == "baseline" else f'#include "cpu/isa/target_{isa}.inl"'
    units = units_of(functor, target, bool(architectures))
    # The name changes with all that the result depends on: sources, flags, this machine's instruction set and GPUs.
    digest = hashlib.sha256(repr((units, extension.compile_flags, architectures)).encode())
    for header in sorted(_sources().rglob("*.*")):
        if header.suffix in (".h", ".inl", ".cuh", ".cu"):
            digest.update(header.read_bytes())
    module = f"{op}_{digest.hexdigest()[:12]}"
    try:
        path = _compiled(module, units, _for_architectures(architectures), name)
    except OSError as error:
        return _natively(name, f"torch's extension cache cannot be used: {error}")
    entry_point: Any = ctypes.CDLL(path).fusedloss_custom
    entry_point.restype = ctypes.c_void_p
    address: int = entry_point()
    return address, ""


def _natively(name: str, why: str) -> tuple[None, str]:
    """Where nothing can be compiled. What a compiler refuses is an error."""
    warnings.warn(f"{name} runs natively: {why}", stacklevel=5)
    return None, why


def _why_not(compiler: str) -> str:
    """Why nothing can be compiled here. A ninja beside the interpreter serves an environment that is not activated."""
    if shutil.which(compiler) is None:
        return "no C++ compiler"
    if shutil.which("ninja") is None:
        beside = sysconfig.get_path("scripts")
        if shutil.which("ninja", path=beside) is None:
            return "no ninja: pip install ninja"
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), beside])
    return ""


def _cuda_architectures() -> list[str]:
    """The architectures listed in TORCH_CUDA_ARCH_LIST, otherwise those of the GPUs here; none without nvcc.

    Those below 8.0 are left out, because the kernels do not compile for them.
    """
    from torch.utils import cpp_extension

    if extension.cuda_architectures == "none" or cpp_extension.CUDA_HOME is None:  # type: ignore[union-attr]
        return []
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if architectures.strip() in ("", "native"):
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        architectures = ";".join(f"{major}.{minor}" for major, minor in sorted(gpus))
    return listed(architectures)[0]


def _for_architectures(architectures: list[str]) -> list[str]:
    """nvcc's options for entries such as 9.0a or 10.0+PTX, where PTX serves later GPUs."""
    options = []
    for entry in architectures:
        number, _, ptx = entry.replace(".", "").partition("+")
        options += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in ["sm"] + ["compute"] * bool(ptx)]
    return options


def _compiled(module: str, units: Units, cuda_options: list[str], name: str) -> str:
    """Compiles a library, or finds it in torch's extension cache; returns its path."""
    from torch.utils import cpp_extension

    def build(folder: Path) -> Path:
        for file, text in units.items():
            (folder / file).write_text(text)
        try:
            cpp_extension.load(
                module,
                [str(folder / file) for file in units],
                extra_cflags=extension.compile_flags.split(),  # type: ignore[union-attr]
                extra_cuda_cflags=["-O3", "-Xcompiler", "-fvisibility=hidden", *cuda_options],
                extra_include_paths=[str(_sources())],
                build_directory=str(folder),
                with_cuda=any(file.endswith(".cu") for file in units),
                is_python_module=False,
            )
        except RuntimeError as error:
            # The first line of the compiler's errors, without the page of templates that follows.
            found = re.search(r"^.*\berror: .*$", str(error), re.MULTILINE)
            raise RuntimeError(f"{name} did not compile: {found[0] if found else error}") from None
        return next(folder.glob(f"*{cpp_extension.LIB_EXT}"))

    folder = Path(cpp_extension._get_build_directory(module, verbose=False))
    return str(cached(folder / f"{module}{cpp_extension.LIB_EXT}", name, build))
