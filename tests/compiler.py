"""What the tests compile with, and how they keep what they compiled."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "c++")
# The sanitizers' runtime is preloaded for the kernels: a compiler runs for half as long again with it.
WITHOUT_PRELOAD = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def fingerprint(command: str, *sources: Path) -> str:
    """A name for what the command makes of files, and of folders' C++ files, with this machine's compiler."""
    digest = hashlib.sha256(f"{command} {platform.node()}".encode())
    digest.update(subprocess.run([*COMPILER.split(), "--version"], capture_output=True).stdout)
    for source in sources:
        for file in sorted(source.rglob("*.*") if source.is_dir() else [source]):
            if file == source or file.suffix in (".h", ".cuh", ".inl", ".cpp", ".cu"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def precompiled(header: Path, includes: str, flags: Sequence[str]) -> list[str]:
    """The flags that read these includes as the compiler keeps them: a small file's time goes into its headers."""
    if not header.exists():
        header.write_text(includes)
        command = [*COMPILER.split(), *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
        subprocess.run(command, check=True, env=WITHOUT_PRELOAD)
    return ["-include", str(header)]
