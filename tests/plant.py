"""Planted mistakes: one piece of a source file replaced once, for a test that must fail then."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "c++")


def replace_once(file: Path, old: str, new: str) -> None:
    source = file.read_text()
    assert source.count(old) == 1, f"expected {old!r} once in {file.name}, found it {source.count(old)} times"
    file.write_text(source.replace(old, new))


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc in the folder, with the mistake in one of its files."""
    copy = Path(shutil.copytree(CSRC, folder / "csrc"))
    replace_once(copy / file, old, new)
    return copy


def keep_one_type(csrc: Path, name: str) -> None:
    """Compiles the kernels for that storage type alone, whatever type a call asks for: in a fraction of the time."""
    header = csrc / "kernels" / "functors.h"
    one_type = f"  static_cast<void>(dtype);\n  return f({name}());\n"
    text, switches = re.subn(r"  switch \(dtype\) \{.*?\n  \}\n", one_type, header.read_text(), flags=re.DOTALL)
    assert switches == 1
    header.write_text(text)


def keep_one_loss(csrc: Path, family: str, name: str) -> None:
    """Leaves that loss alone in the list of its family, where it has the number 0."""
    header = csrc / "losses" / f"{family}.h"
    functor = dict(re.findall(r"  X\((\w+), (\w+)\)", header.read_text()))[name]
    listed, one_loss = r"(#define \w+\(X\))( *\\\n  X\(.*\))+", rf"\1 X({name}, {functor})"
    text, lists = re.subn(listed, one_loss, header.read_text())
    assert lists == 1
    header.write_text(text)


def keep_one_of_each_driver(csrc: Path) -> None:
    """For sanitizers, which look at memory: of kernels that differ in arithmetic alone, one.

    bfloat16 is loaded and stored as float16 is, and mse reads what the other losses of a difference read. Calls of what
    is left out give other results.
    """
    replace_once(csrc / "kernels" / "functors.h", "    case DType::Half:\n      return f(fp16());\n", "")
    for name, functor in (("l1", "L1"), ("smooth_l1", "SmoothL1"), ("huber", "Huber")):
        replace_once(csrc / "losses" / "pointwise.h", f"X({name}, {functor})", f"X({name}, Mse)")


def fingerprint(command: str, *sources: Path) -> str:
    """A name for what the command makes of files, and of folders' C++ files, with this machine's compiler."""
    digest = hashlib.sha256(f"{command} {platform.node()}".encode())
    digest.update(subprocess.run([*COMPILER.split(), "--version"], capture_output=True).stdout)
    for source in sources:
        for file in sorted(source.rglob("*.*") if source.is_dir() else [source]):
            if file == source or file.suffix in (".h", ".cuh", ".inl", ".cpp", ".cu"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
