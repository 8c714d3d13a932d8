"""The whole CPU extension under AddressSanitizer and UBSan: python tests/sanitize.py [--seconds 600] [tests ...]

Builds a copy of this checkout with them in build/sanitized, a quarter of an hour of CPU time with gcc. There run the
tests of edges, hostile calls and layouts, or those that are named, and random calls for so many seconds of each kind.
First it reads beyond the end of a tensor, which has to be reported.
"""

import argparse
import os
import shutil
import subprocess
import sys

from compiler import COMPILER, ROOT

COPY = ROOT / "build" / "sanitized"
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"  # vptr: of hidden classes
)
TESTS = ["edges", "hostile_calls", "margin_edges", "index_targets", "row_sums", "distillation", "pointwise_shapes"]
# A tensor of 64 numbers in memory of 10.
OVERRUN = """
import ctypes, torch, fusedloss.functional as L
from fusedloss._library import extension
assert extension is not None
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
memory = malloc(ctypes.c_size_t(40))
x = torch.frombuffer((ctypes.c_float * 64).from_address(memory), dtype=torch.float32)
L.mse_loss(x, torch.zeros(64))
"""


def copied() -> None:
    """What has changed, so that ninja compiles no more than that."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        source, copy = ROOT / name, COPY / name
        if source.exists() and (not copy.exists() or copy.read_bytes() != source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def build() -> None:
    flags = f"-g1 -fno-omit-frame-pointer {SANITIZERS}"
    environment = {**os.environ, "CFLAGS": flags, "LDFLAGS": SANITIZERS, "FUSEDLOSS_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=COPY, env=environment, check=True)


def run(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Python, in the copy. Python itself has no sanitizer, so that the runtimes are loaded before it."""

    def runtime(name: str) -> str:
        found = subprocess.run([*COMPILER.split(), f"-print-file-name={name}"], capture_output=True, text=True)
        return found.stdout.strip()

    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python never frees all; tests ask for too much
        "PYTHONPATH": str(COPY),
    }
    return subprocess.run([sys.executable, *arguments], cwd=COPY, env=environment, text=True, **options)  # type: ignore[call-overload, no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", default="60")
    parser.add_argument("tests", nargs="*", default=[f"tests/contract/test_{name}.py" for name in TESTS])
    options = parser.parse_args()
    copied()
    build()
    report = run("-c", OVERRUN, capture_output=True).stderr
    if "heap-buffer-overflow" not in report:
        print(f"expected a report of a read beyond the end, got {report!r}")
        return 1
    runs = [("-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests)]
    runs += [(f"tests/fuzz/{program}.py", "--seconds", options.seconds) for program in ("raw_ops", "public")]
    return max([run(*each).returncode for each in runs])


if __name__ == "__main__":
    sys.exit(main())
