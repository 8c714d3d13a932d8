"""Builds fusedloss._C where that can be done; where not, installs the pure Python package, which knows why."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from contextlib import contextmanager
from pathlib import Path
from runpy import run_path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

# A new environment of Python 3.10 or 3.11 brings 65.5, which pip keeps, and which stumbles over pyproject.toml.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"fusedloss: expected setuptools 77.0.3 or newer, found {setuptools.__version__}.\n"
        '    pip install "setuptools>=77.0.3"'
    )


def toolkit():
    """Where nvcc's toolkit lies: nvcc itself knows, also where the one on the PATH is a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    return os.path.normpath(found[1].strip()) if found else None


if "CUDA_HOME" not in os.environ and (found := toolkit()):
    os.environ["CUDA_HOME"] = found  # torch would guess it from the path of nvcc

try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        get_cxx_compiler,
        include_paths,
    )
except ImportError as error:
    raise SystemExit(
        f"fusedloss is built against the torch it will run with, and that is missing here ({error}).\n"
        "Install the build requirements, then build without isolation:\n"
        '    pip install torch "setuptools>=77.0.3" wheel ninja\n'
        "    pip install --no-build-isolation ."
    ) from None

HERE = Path(__file__).parent


NOT_WANTED = "FUSEDLOSS_NO_EXTENSION=1 when it was built"

# What a build without TORCH_CUDA_ARCH_LIST is for: A100, H100 and B200, and by PTX what comes after.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def cuda_architectures():
    """TORCH_CUDA_ARCH_LIST without what the kernels are not written for; images often name every GPU there ever was."""
    listed = run_path(str(HERE / "fusedloss" / "custom" / "_architectures.py"))["listed"]
    new, others = listed(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    old = [entry for entry in others if entry[0].isdigit()]
    if old:
        print(f"fusedloss: no CUDA kernels for {', '.join(old)}: they need 8.0 or more; such a GPU runs natively")
    unknown = [entry for entry in others if entry not in old]  # torch knows "native", or says what it knows
    return ";".join(new + unknown) or CUDA_ARCHITECTURES


def with_cuda():
    """Whether to build the CUDA kernels: a torch for CUDA, and its compiler."""
    wanted = os.environ.get("FUSEDLOSS_CUDA")
    if wanted == "0":
        return False
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if wanted == "1" and not possible:
        found = f"torch for CUDA {torch.version.cuda}, a toolkit at {CUDA_HOME}"
        raise SystemExit(f"FUSEDLOSS_CUDA=1: expected a torch built for CUDA and nvcc, found {found}")
    return possible


def files_in(*folders):
    found = []
    for folder in folders:
        sources = [path for path in (HERE / "csrc" / folder).glob("*.*") if path.suffix in (".cpp", ".cu")]
        if not sources:
            raise SystemExit(f"fusedloss: expected the sources of kernels in csrc/{folder}, found none")
        found += sources
    return sorted(found)


def joined(sources):
    """The files of csrc/torch in two units, one for each core: most of a file's 20 seconds are torch's headers."""
    units = {}
    for source in sources:
        unit = "pointwise" if source.name.startswith("pointwise") else "others"
        units.setdefault(HERE / "build" / "torch" / f"{unit}.cpp", []).append(source)
    for unit, members in units.items():
        text = "".join(f'#include "{os.path.relpath(member, unit.parent)}"\n' for member in members)
        unit.parent.mkdir(parents=True, exist_ok=True)
        if not unit.exists() or unit.read_text() != text:  # ninja goes by the time of its writing
            unit.write_text(text)
    return list(units)


def accepted(compiler, flags):
    """Those that the compiler knows; clang warns of the others."""

    def knows(some):
        command = [*compiler, "-Werror", *some, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return flags if knows(flags) else [flag for flag in flags if knows([flag])]


def why_not():
    """Why no kernels are to be built here, or nothing."""
    if os.environ.get("FUSEDLOSS_NO_EXTENSION") == "1":
        return NOT_WANTED
    compiler, *_ = get_cxx_compiler().split()
    return "" if shutil.which(compiler) else f"no C++ compiler: {compiler} is not on the PATH"


def extensions():
    if NOT_BUILT:
        return []
    cuda = with_cuda()
    units = files_in("cpu", "cpu/isa", *(["cuda"] if cuda else []))
    units += joined(files_in("torch", "torch/cpu", *(["torch/cuda"] if cuda else [])))
    sources = [str(unit.relative_to(HERE)) for unit in units]
    # Vectors as at -O3, in half its time; it would also work on two rows of lanes at once, number by number.
    cxx = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-funswitch-loops", "-fpeel-loops"]
    # They let comparisons and selects become vector code; no rounding changes.
    cxx += ["-fno-math-errno", "-fno-trapping-math"]
    # Python's own flags ask for debugging information, five times the size of the code.
    cxx += [] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"]
    cxx += ["-fvisibility=hidden", "-Wall", "-Wextra"]
    # On this processor gcc notes arguments that old versions passed in another way; here one compiler makes both sides.
    cxx += ["-Wno-psabi"] if platform.machine() == "aarch64" else []
    of_gcc = list(cxx)
    cxx = accepted(get_cxx_compiler().split(), of_gcc)
    if cxx != of_gcc:
        cxx.append("-Wno-unknown-pragmas")  # GCC ivdep
    slopes = run_path(str(HERE / "fusedloss" / "_torchs_slopes.py"))["flags"]()
    cxx += slopes
    # What a user's own loss is compiled with later.
    flags_of_kernels = " ".join(cxx)
    # As system headers, torch's own do not warn: every warning is about this project.
    cxx += [flag for path in include_paths("cuda" if cuda else "cpu") for flag in ("-isystem", path)]
    macros = [("FUSEDLOSS_TORCH_VERSION", f'"{torch.__version__}"')]
    macros.append(("FUSEDLOSS_COMPILE_FLAGS", f'"{flags_of_kernels}"'))
    if not cuda:
        macros.append(("FUSEDLOSS_CUDA_ARCHITECTURES", '"none"'))
        extension, flags = CppExtension, {"cxx": cxx}
    else:
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures()
        macros += [("FUSEDLOSS_CUDA", "1"), ("FUSEDLOSS_CUDA_ARCHITECTURES", f'"{architectures}"')]
        nvcc = ["-O3", "-Xcompiler", "-Wall,-Wextra,-fvisibility=hidden", *slopes]
        extension, flags = CUDAExtension, {"cxx": cxx, "nvcc": nvcc}
    module = extension("fusedloss._C", sorted(sources), define_macros=macros, extra_compile_args=flags)
    module.depends = [str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.*")]
    return [module]


def record(package, **facts):
    """For fusedloss/_library.py: beside the extension, or in its place."""
    package.mkdir(parents=True, exist_ok=True)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").with_suffix(".json").write_text(json.dumps(facts) + "\n")


@contextmanager
def overheard():
    """What processes write to this one's stdout goes there, and into the list that this gives."""
    sys.stdout.flush()
    heard, kept = [], os.dup(1)
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(write)

    def pass_on():
        while some := os.read(read, 1 << 16):
            os.write(kept, some)
            heard.append(some)

    listener = threading.Thread(target=pass_on)
    listener.start()
    try:
        yield heard
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        listener.join()
        os.close(read)
        os.close(kept)


def first_error(output):
    """The compiler's, where it wrote one."""
    found = re.search(rb"^.*\berror: .*$", output, re.MULTILINE)
    return found[0].decode(errors="replace").strip() if found else ""


class Recorded(build_py):
    """Says in the package why it has no kernels, where that is known before a build."""

    def run(self):
        super().run()
        if NOT_BUILT:
            package = Path(self.get_package_dir("fusedloss") if self.editable_mode else f"{self.build_lib}/fusedloss")
            (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)  # of an earlier build
            record(package, reason=NOT_BUILT)
            print(f"fusedloss: {NOT_BUILT}; {WITHOUT}", file=sys.stderr)


class Forgiving(BuildExtension):
    """A build that fails leaves the package without kernels, unless they were asked for."""

    failure = ""

    def build_extensions(self):
        try:
            with overheard() as output:
                super().build_extensions()
        except Exception as error:
            self.failure = f"the build failed: {first_error(b''.join(output)) or error}"
            self.extensions.clear()

    def run(self):
        super().run()
        library = Path(self.get_ext_fullpath("fusedloss._C"))
        if not self.failure:
            record(library.parent, torch=torch.__version__)
        elif REQUIRED:
            raise SystemExit(f"fusedloss: {self.failure}")
        else:
            library.unlink(missing_ok=True)  # of older sources
            record(library.parent, reason=self.failure)
            print(f"fusedloss: {self.failure}\n{WITHOUT}", file=sys.stderr)


WITHOUT = (
    "installed without kernels, so that losses run in native PyTorch. FUSEDLOSS_BUILD=require makes this an error, "
    "FUSEDLOSS_NO_EXTENSION=1 says that no kernels are wanted."
)
REQUIRED = (
    os.environ.get("FUSEDLOSS_BUILD") == "require"
    or os.environ.get("FUSEDLOSS_CUDA") == "1"
    or "build_ext" in sys.argv  # by its name
)
NOT_BUILT = why_not()
if NOT_BUILT and REQUIRED and NOT_BUILT != NOT_WANTED:
    raise SystemExit(f"fusedloss: {NOT_BUILT}")

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Forgiving, "build_py": Recorded},
)
