"""The build: what a source distribution holds, and what becomes of a build that fails."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from compiler import ROOT
from marks import needs_compiler, on_cpu_alone
from torch.utils.cpp_extension import include_paths

pytestmark = on_cpu_alone("another process")
another_build = pytest.mark.deep("builds that fail in other ways; one that fails is in the daily run")


def setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, env=known | environment, cwd=cwd, capture_output=True, text=True, timeout=300)


def recorded(build: Path) -> dict[str, str]:
    (found,) = build.glob("lib*/fusedloss/_C.*.json")
    return json.loads(found.read_text())


@needs_compiler
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout to compare with")
def test_a_source_distribution_holds_what_git_holds(tmp_path):
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    tracked = {name for name in git if name and (ROOT / name).exists()}
    made = setup("-q", "egg_info", "--egg-base", str(tmp_path), FUSEDLOSS_CUDA="0")
    assert made.returncode == 0, made.stderr
    listed = set((tmp_path / "fusedloss.egg-info" / "SOURCES.txt").read_text().split("\n"))
    assert tracked <= listed, sorted(tracked - listed)
    assert not {name for name in listed if name.startswith("build/") or name.endswith((".so", ".pyc"))}


COMPILER = """#!/bin/sh
case "$*" in *.cpp*) echo "in a header"; echo "kernels.cpp:12:5: error: no such type"; echo "and more"; exit 1;; esac
exec c++ "$@"
"""


@needs_compiler
def test_a_build_that_fails_is_recorded(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    why = "the build failed: kernels.cpp:12:5: error: no such type"
    made = setup("build", "--build-base", str(tmp_path), CXX=str(compiler), FUSEDLOSS_CUDA="0")
    assert made.returncode == 0 and recorded(tmp_path) == {"reason": why}
    assert made.stderr.rstrip().split("\n")[-2] == f"fusedloss: {why}"
    assert "FUSEDLOSS_BUILD=require" in made.stderr and "and more" in made.stdout


def test_an_old_setuptools_is_named():
    """The one that a new environment has: without this, its error is about the licence."""
    program = (
        "import runpy, setuptools, sys; setuptools.__version__ = '65.5.0'; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 1 and made.stdout == ""
    assert made.stderr.startswith("fusedloss: expected setuptools 77.0.3 or newer, found 65.5.0.\n")


@another_build
@needs_compiler
def test_a_build_that_fails_may_be_an_error(tmp_path):
    build = ("build", "--build-base", str(tmp_path))
    made = setup(*build, CXX="c++ --no-such-option", FUSEDLOSS_CUDA="0", FUSEDLOSS_BUILD="require")
    assert made.returncode == 1 and "fusedloss: the build failed: " in made.stderr
    assert not list(tmp_path.glob("lib*/fusedloss/_C.*.*"))


@another_build
def test_no_compiler_is_recorded_or_an_error(tmp_path):
    why = "no C++ compiler: nowhere is not on the PATH"
    build = ("build", "--build-base", str(tmp_path))
    made = setup(*build, CXX="nowhere c++")
    assert made.returncode == 0 and why in made.stderr and recorded(tmp_path) == {"reason": why}
    made = setup(*build, CXX="nowhere c++", FUSEDLOSS_BUILD="require")
    assert made.returncode == 1 and made.stderr == f"fusedloss: {why}\n"


@another_build
def test_sources_that_are_missing_are_an_error(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    (tmp_path / "fusedloss" / "custom").mkdir(parents=True)
    made = setup("--version", cwd=tmp_path, FUSEDLOSS_CUDA="0")
    assert made.returncode == 1
    assert made.stderr == "fusedloss: expected the sources of kernels in csrc/cpu, found none\n"


needs_clang = pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ here, and nothing else covers it")
STRICT = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-trapping-math"]


@needs_clang
@pytest.mark.deep("a file of each instruction set, by another compiler than the build's", minutes=1)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_clang_compiles_the_kernels(isa, tmp_path):
    source = ROOT / "csrc" / "cpu" / "isa" / f"{isa}.cpp"
    command = ["clang++", *STRICT, "-O0", "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:2000]


@needs_clang
@pytest.mark.deep("a file that includes torch, by another compiler than the build's")
def test_clang_reads_what_includes_torch():
    folders = [*include_paths("cpu"), sysconfig.get_path("include")]
    system = [flag for folder in folders for flag in ("-isystem", folder)]
    source = ROOT / "csrc" / "torch" / "pointwise_autograd.cpp"
    made = subprocess.run(["clang++", *STRICT, "-fsyntax-only", *system, str(source)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:2000]
