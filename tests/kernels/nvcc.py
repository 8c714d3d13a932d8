"""Compiles the CUDA kernels, reads what ptxas says of each (registers, stack, spills) and counts its instructions.

python tests/kernels/nvcc.py           prints both tables
python tests/kernels/nvcc.py --write   writes them to registers.txt and instructions.txt, unless a kernel spills

The first table names the sources that both are of. While they stay as they are, this nvcc would say again what it said
then.
"""

import hashlib
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import instruction_table
import instructions
import sass
import whole_kernel
from instruction_table import Counts

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TABLE = Path(__file__).with_name("registers.txt")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100, B200: those of setup.py
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]

COUNTING = [Path(module.__file__ or "") for module in (sass, instructions, whole_kernel)]
Registers = dict[str, tuple[int, ...]]  # of each kernel, by architecture
Number = TypeVar("Number", int, float)


@dataclass
class Run:
    """What nvcc made of a file for some architectures; the log is of nvcc and ptxas."""

    command: list[str]
    returncode: int
    log: str
    # Empty where nothing was counted: by architecture the instructions of an element of each kernel, and those of the
    # whole kernels that have targets.
    loops: dict[str, dict[str, float]] = field(default_factory=dict)
    wholes: dict[str, float] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)  # and why


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


def disassembler() -> str | None:
    """nvdisasm, which comes with CUDA or as a package of its own."""
    if on_path := shutil.which("nvdisasm"):
        return on_path
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "nvdisasm"), None)


def fingerprint() -> str:
    """Of all that nvcc compiles, how, and how instructions are counted: the code without its comments."""
    digest = hashlib.sha256(" ".join([*FLAGS, *ARCHITECTURES]).encode())
    sources = [file for folder in ("cuda", "kernels", "losses") for file in (CSRC / folder).iterdir()]
    of_cpu = CSRC / "kernels" / "cpu.h"  # which no CUDA file includes
    for file in [*sorted(file for file in sources if file != of_cpu), *COUNTING]:
        words = r" *#.*|\"{3}[\s\S]*?\"{3}" if file.suffix == ".py" else r" *//.*"
        code = re.sub(words, "", file.read_text())
        digest.update("\n".join([file.name, *filter(str.strip, code.splitlines())]).encode())
    return digest.hexdigest()[:16]


def compile(sources: Sequence[Path], architectures: Sequence[str], counting: bool = False) -> list[Run]:
    """One nvcc for each source, whether it succeeds or not: what it compiles for the host serves all architectures."""
    code = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures]

    def run(source: Path) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            keep = ["-keep", "-keep-dir", folder] if counting else []
            command = ["nvcc", *FLAGS, f"-I{CSRC}", *code, *keep, "-c", str(source), "-o", f"{folder}/object.o"]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            result = Run(command, done.returncode, done.stdout)
            if counting and done.returncode == 0:
                for name in architectures:
                    count(
                        result,
                        name,
                        disassembled(Path(folder) / f"{source.stem}.{name.replace('sm', 'compute')}.cubin"),
                    )
            return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, sources))


def disassembled(cubin: Path) -> str:
    tool = disassembler()
    assert tool, "expected nvdisasm, of CUDA or of the package nvidia-cuda-nvdisasm"
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def count(run: Run, architecture: str, text: str) -> None:
    mangled, codes = zip(*sass.read(text), strict=True)
    loops = run.loops[architecture] = {}
    for name, code in zip(map(shortened, demangled(mangled)), codes, strict=True):
        # What cannot be counted is told at the end: compiling anew takes a quarter of an hour.
        try:
            loops[name] = math.nan
            kernel = sass.Kernel(code)
            loops[name] = instructions.count(name, kernel)
            if architecture == whole_kernel.ARCHITECTURE:
                of_classes = whole_kernel.counts(name, kernel)
                run.wholes |= {instruction_table.place(name, classes): number for classes, number in of_classes.items()}
        except AssertionError as error:
            run.uncounted.append(f"{name} on {architecture}: {error}")


def functions(runs: list[Run], architecture: str) -> list[Function]:
    """Of every function that the runs, which must have succeeded, compiled for an architecture."""
    for run in runs:
        assert run.returncode == 0, f"{' '.join(run.command)}\n{run.log}"
    found = [function for run in runs for function in parse(said_of(architecture, run.log))]
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


def demangled(names: Sequence[str]) -> list[str]:
    if shutil.which("c++filt") is None:  # it comes with the linker that nvcc's host compiler needs
        return list(names)
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
    return beside([{f.name: f.registers for f in found if f.registers is not None} for found in functions_of.values()])


def counts(runs: list[Run], architectures: Sequence[str]) -> Counts:
    """The instructions of every kernel, from runs that counted them."""
    columns = [{name: number for run in runs for name, number in run.loops[of].items()} for of in architectures]
    return Counts(beside(columns), {name: number for run in runs for name, number in run.wholes.items()})


def beside(columns: Sequence[Mapping[str, Number]]) -> dict[str, tuple[Number, ...]]:
    """Every kernel's numbers, an architecture after the other; all must have the same kernels."""
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
    if disassembler() is None:
        sys.exit("expected nvdisasm, to count instructions: pip install nvidia-cuda-nvdisasm")
    runs = compile(SOURCES, ARCHITECTURES, counting=True)
    functions_of = {architecture: functions(runs, architecture) for architecture in ARCHITECTURES}
    of_registers = table(version(), fingerprint(), registers(functions_of))
    counted = counts(runs, ARCHITECTURES)
    if instruction_table.TABLE.exists():
        counted.binds = instruction_table.read(instruction_table.TABLE.read_text()).binds
    of_instructions = instruction_table.table(counted, ARCHITECTURES)
    spilling = [f"{name}: {function}" for name, some in functions_of.items() for function in using_local_memory(some)]
    if sys.argv[1:] == ["--write"]:
        if spilling:
            sys.exit("\n".join(["expected kernels that use no local memory, got:", *spilling]))
        TABLE.write_text(of_registers)
        instruction_table.TABLE.write_text(of_instructions)
        left = [message for run in runs for message in run.uncounted]
        if unexplained := instruction_table.unexplained(counted):
            left += [f"say in {instruction_table.TABLE} what binds:", *unexplained]
        if left:
            sys.exit("\n".join(["both tables are written, but:", *left]))
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        print(of_registers, of_instructions, *spilling, sep="\n")


if __name__ == "__main__":
    main()
