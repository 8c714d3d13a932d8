"""The C++ of a custom loss: its source, the compiler's call, and the address of the result."""

import ctypes
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._library import extension, why_native
from ._architectures import listed
from ._cache import cached
from ._expression import Tree, of_difference, renamed
from ._printing import cpp


def functor(trees: tuple[Tree, Tree, Tree], params: Mapping[str, float]) -> str:
    """The functor of a loss with these expressions for the value and its slopes by x and t."""
    # With a name of its own a parameter can be called as it likes: double, M_PI, result.
    own = {name: f"param_{name}" for name in params}
    value, grad, grad_target = (cpp(renamed(tree, own)) for tree in trees)
    declared = f"T {', '.join(own.values())};" if params else ""
    members = ", ".join(f"{name}(T(given[{i}]))" for i, name in enumerate(own.values()))
    arguments = "([[maybe_unused]] T x, [[maybe_unused]] T t) const"
    return f"""
namespace fusedloss::FUSEDLOSS_ISA::functions {{

template <class T>
struct Expression {{
  static constexpr bool of_difference = {str(of_difference(trees[0])).lower()};
  static constexpr ResultDType result = ResultDType::Promoted;
  {declared}
  explicit FUSEDLOSS_HD Expression([[maybe_unused]] const double* given) {": " + members if members else ""} {{}}
  FUSEDLOSS_HD T value{arguments} {{ return {value}; }}
  FUSEDLOSS_HD T grad{arguments} {{ return {grad}; }}
  FUSEDLOSS_HD T grad_target{arguments} {{ return {grad_target}; }}
}};

}}
"""


_ON_CPU = """
{target}
#include "kernels/custom.h"
#include "losses/functions.h"
#include "cpu/pointwise.inl"
#include "cpu/one_hot.inl"
#include "cpu/pointwise_tiles.inl"
{functor}
namespace fusedloss {{
{cuda}
extern "C" __attribute__((visibility("default"))) const CustomPointwise* fusedloss_custom() {{
  using namespace FUSEDLOSS_ISA;
  static const CustomPointwise custom = {{kCustomVersion, pointwise_traits<functions::Expression<double>>(),
                                         pointwise<functions::Expression>, {cuda_entries}}};
  return &custom;
}}
}}
"""

_CUDA_DECLARED = """\
int fusedloss_custom_cuda(PointwiseResult, const CudaPointwiseArgs&, CudaStream);
bool fusedloss_custom_cuda_has_kernels();
"""
_CUDA_ENTRIES = "fusedloss_custom_cuda, fusedloss_custom_cuda_has_kernels"

_ON_CUDA = """
#include "cuda/pointwise.cuh"
#include "losses/functions.h"
{functor}
namespace fusedloss {{
int fusedloss_custom_cuda(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {{
  return FUSEDLOSS_ISA::run_pointwise<FUSEDLOSS_ISA::functions::Expression>(result, args, stream);
}}
bool fusedloss_custom_cuda_has_kernels() {{
  using namespace FUSEDLOSS_ISA;
  return has_code(pointwise_dense<PointwiseResult::Sum, float, functions::Expression<float>>);
}}
}}
"""


def _sources() -> Path:
    """The folder of the C++ sources: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def library(op: str, functor: str, name: str) -> tuple[int | None, str]:
    """The address of the compiled loss, or None and why it cannot be compiled here.

    Raises:
        RuntimeError: the compiler refuses it.
    """
    from torch.utils import cpp_extension

    if extension is None:
        return None, why_native
    if shutil.which(cpp_extension.get_cxx_compiler().split()[0]) is None:
        warnings.warn(f"{name} runs natively: no C++ compiler", stacklevel=4)
        return None, "no C++ compiler"
    isa = extension.cpu_isa()
    architectures = _cuda_architectures()
    target = "" if isa == "baseline" else f'#include "cpu/isa/target_{isa}.inl"'
    declared, entries = (_CUDA_DECLARED, _CUDA_ENTRIES) if architectures else ("", "nullptr, nullptr")
    source = _ON_CPU.format(target=target, functor=functor, cuda=declared, cuda_entries=entries)
    # The name changes with all that the result depends on: sources, flags, this machine's instruction set and GPUs.
    digest = hashlib.sha256(repr((source, extension.compile_flags, architectures)).encode())
    for header in sorted(_sources().rglob("*.*")):
        if header.suffix in (".h", ".inl", ".cuh"):
            digest.update(header.read_bytes())
    module = f"{op}_{digest.hexdigest()[:12]}"
    cuda_source = _ON_CUDA.format(functor=functor) if architectures else None
    path = _compiled(module, source, cuda_source, _for_architectures(architectures), name)
    entry_point: Any = ctypes.CDLL(path).fusedloss_custom
    entry_point.restype = ctypes.c_void_p
    address: int = entry_point()
    return address, ""


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


def _compiled(module: str, source: str, cuda_source: str | None, cuda_options: list[str], name: str) -> str:
    """Compiles a library, or finds it in torch's extension cache; returns its path."""
    from torch.utils import cpp_extension

    def build(folder: Path) -> Path:
        try:
            cpp_extension.load_inline(
                module,
                cpp_sources=[source],
                cuda_sources=[] if cuda_source is None else [cuda_source],
                extra_cflags=extension.compile_flags.split(),  # type: ignore[union-attr]
                extra_cuda_cflags=["-O3", *cuda_options],
                extra_include_paths=[str(_sources())],
                build_directory=str(folder),
                with_cuda=cuda_source is not None,
                is_python_module=False,
                no_implicit_headers=True,
            )
        except RuntimeError as error:
            # The first line of the compiler's errors, without the page of templates that follows.
            found = re.search(r"^.*\berror: .*$", str(error), re.MULTILINE)
            raise RuntimeError(f"{name} did not compile: {found[0] if found else error}") from None
        return next(folder.glob(f"*{cpp_extension.LIB_EXT}"))

    folder = Path(cpp_extension._get_build_directory(module, verbose=False))
    return str(cached(folder / f"{module}{cpp_extension.LIB_EXT}", name, build))
