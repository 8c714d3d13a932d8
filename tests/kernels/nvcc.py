"""Compiles the CUDA kernels and reads what ptxas says of each: registers, stack frame, spills.

python tests/kernels/nvcc.py           prints the registers
python tests/kernels/nvcc.py --write   writes them to tests/kernels/registers.txt, unless a kernel spills

The table names the sources it is of. While they stay as they are, this nvcc would say again what it said then.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("registers.txt")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100, B200: those of setup.py
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]

Run = subprocess.CompletedProcess[str]
Registers = dict[str, tuple[int, ...]]  # of each kernel, by architecture


@dataclass(frozen=True)
class Function:
    """What a function of the device needs; registers are those of a kernel, and None where it is only called."""

    name: str
    registers: int | None
    stack: int  # bytes, as are the next two
    spill_stores: int
    spill_loads: int

    @property
    def uses_local_memory(self) -> bool:
        return self.stack + self.spill_stores + self.spill_loads > 0

    def __str__(self) -> str:
        return (
            f"{self.name}: stack {self.stack}, spill stores {self.spill_stores}, spill loads {self.spill_loads} bytes"
        )


def _ask(option: str) -> str:
    return subprocess.run(["nvcc", option], capture_output=True, text=True, check=True).stdout


def version() -> str:
    """As in 13.0.88."""
    found = re.search(r"\bV(\d+(?:\.\d+)+)", _ask("--version"))
    assert found, "nvcc --version names no version"
    return found[1]


def supported() -> list[str]:
    known = _ask("--list-gpu-code").split()
    return [architecture for architecture in ARCHITECTURES if architecture in known]


def fingerprint() -> str:
    """Of all that nvcc compiles, and how: the code without its comments."""
    digest = hashlib.sha256(" ".join([*FLAGS, *ARCHITECTURES]).encode())
    for file in sorted(file for folder in ("cuda", "kernels", "losses") for file in (CSRC / folder).iterdir()):
        code = re.sub(r" *//.*", "", file.read_text())
        digest.update("\n".join([file.name, *filter(None, code.splitlines())]).encode())
    return digest.hexdigest()[:16]


def compile(sources: Sequence[Path], architectures: Sequence[str]) -> list[Run]:
    """One nvcc for each source, whether it succeeds or not: what it compiles for the host serves all architectures."""
    code = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def run(source: Path) -> Run:
            to = Path(folder) / f"{source.stem}.o"
            command = ["nvcc", *FLAGS, f"-I{CSRC}", *code, "-c", str(source), "-o", str(to)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return Run(command, done.returncode, done.stdout)

        return list(pool.map(run, sources))


def functions(runs: list[Run], architecture: str) -> list[Function]:
    """Of every function that the runs, which must have succeeded, compiled for an architecture."""
    for run in runs:
        assert run.returncode == 0, f"{' '.join(run.args)}\n{run.stdout}"
    found = [function for run in runs for function in parse(said_of(architecture, run.stdout))]
    names = [function.name for function in found if function.registers is not None]
    assert len(set(names)) == len(names), "two kernels have one name"
    return found


def said_of(architecture: str, log: str) -> str:
    """The part of ptxas's log about one architecture: each kernel's first line names it."""
    parts = re.split(r"(?=.*Compiling entry function '\S+' for '(\w+)'\n)", log)
    return "".join(part for name, part in zip(parts[1::2], parts[2::2], strict=True) if name == architecture)


def parse(log: str) -> list[Function]:
    blocks = re.findall(
        r"Function properties for (\S+)\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r"(?:.*Used (\d+) registers)?",
        log,
    )
    # A ptxas that words it otherwise must not pass for one that found nothing.
    kernels = re.findall(r"Compiling entry function '(\S+)'", log)
    assert kernels and kernels == [name for name, *_, registers in blocks if registers], f"not understood:\n{log}"
    names = demangled([name for name, *_ in blocks])
    return [
        Function(shortened(name), int(registers) if registers else None, *map(int, local))
        for name, (_, *local, registers) in zip(names, blocks, strict=True)
    ]


def demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:  # it comes with the linker that nvcc's host compiler needs
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def shortened(name: str) -> str:
    """`forward_rows<bf16, CrossEntropy<float>, true>`: no namespaces, no parameters, enumerators by their names."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\b(fusedloss|cuda)::", "", name)
    name = re.sub(r"(?<=>) (?=>)", "", name)
    header = (CSRC / "kernels" / "pointwise.h").read_text()
    for enum, enumerators in re.findall(r"enum class (\w+) \{ ([\w, ]+) \}", header):
        for number, enumerator in enumerate(enumerators.split(", ")):
            name = re.sub(rf"\({enum}\){number}\b", enumerator, name)
    return re.split(r"(?<=[\w>])\(", name)[0]


def using_local_memory(functions: Sequence[Function]) -> list[Function]:
    return [function for function in functions if function.uses_local_memory]


def registers(functions_of: dict[str, list[Function]]) -> Registers:
    """Of every kernel, from the functions of each architecture, which must have the same kernels."""
    columns = [{f.name: f.registers for f in found if f.registers is not None} for found in functions_of.values()]
    assert all(column.keys() == columns[0].keys() for column in columns), "an architecture has kernels of its own"
    return {name: tuple(column[name] for column in columns) for name in sorted(columns[0])}


def table(nvcc: str, sources: str, counts: Registers) -> str:
    width = max(map(len, counts))
    rows = [("kernel", *ARCHITECTURES), *((name, *map(str, row)) for name, row in counts.items())]
    lines = [f"{name:{width}}" + "".join(f"{cell:>8}" for cell in cells) for name, *cells in rows]
    return "\n".join([f"nvcc {nvcc}, sources {sources}", *lines]) + "\n"


def read_table(text: str) -> tuple[str, str, Registers]:
    """The nvcc, the fingerprint of the sources and the registers of a table."""
    first, _, *lines = text.splitlines()
    rows = [line.rsplit(None, len(ARCHITECTURES)) for line in lines]
    nvcc, sources = first.removeprefix("nvcc ").split(", sources ")
    return nvcc, sources, {name.strip(): tuple(map(int, cells)) for name, *cells in rows}


def differences(committed: Mapping[str, object], found: Mapping[str, object]) -> str:
    """A line for each kernel that is not as in the table, and how to write the table anew; empty where all are."""
    names = sorted(committed.keys() | found.keys())
    lines = [
        f"{name}: {committed.get(name, 'not there')} in the table, {found.get(name, 'not there')} now"
        for name in names
        if committed.get(name) != found.get(name)
    ]
    how = ["", f"{', '.join(ARCHITECTURES)}; to accept: python tests/kernels/nvcc.py --write"]
    return "\n".join(lines + how) if lines else ""


def main() -> None:
    runs = compile(SOURCES, ARCHITECTURES)
    functions_of = {architecture: functions(runs, architecture) for architecture in ARCHITECTURES}
    text = table(version(), fingerprint(), registers(functions_of))
    spilling = [f"{name}: {function}" for name, some in functions_of.items() for function in using_local_memory(some)]
    if sys.argv[1:] == ["--write"]:
        if spilling:
            sys.exit("\n".join(["expected kernels that use no local memory, got:", *spilling]))
        TABLE.write_text(text)
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        print(text, *spilling, sep="\n")


if __name__ == "__main__":
    main()
