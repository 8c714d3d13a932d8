"""The CPU kernels, without torch, under sanitizers: no thread reads or writes where another one writes, or outside.

OpenMP's own synchronisation is not known to ThreadSanitizer, so that threads_driver.cpp shares out the ranges that
torch's threads would get. tests/sanitize.py runs the whole extension under AddressSanitizer and UBSan.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from compiler import COMPILER, CSRC, WITHOUT_PRELOAD, fingerprint
from marks import needs_compiler
from plant import keep_one_loss, replace_once

DRIVER = Path(__file__).with_name("threads_driver.cpp")
# Of UBSan what looks at memory and integers; all of it compiles for twice as long, and tests/sanitize.py has it.
SANITIZERS = {
    "address": "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "thread": "thread",
}
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-fno-sanitize-recover=undefined"]
FLAGS += ["-Wno-unknown-pragmas", "-pthread"]


def build(folder: Path, sanitizer: str) -> None:
    """Of kernels that differ in arithmetic alone, one: formulas touch no memory."""
    source = Path(shutil.copytree(CSRC, folder / "csrc"))
    keep_one_loss(source, "pointwise", "sigmoid_focal")
    for name, functor in (("focal", "Focal"), ("log_probs", "LogProbs")):
        replace_once(source / "losses" / "softmax.h", f"X({name}, {functor})", f"X({name}, CrossEntropy)")
    for type_, name in (("Half", "fp16"), ("Double", "double")):
        replace_once(source / "kernels" / "functors.h", f"    case DType::{type_}:\n      return f({name}());\n", "")
    command = [*COMPILER.split(), *FLAGS, f"-fsanitize={SANITIZERS[sanitizer]}", f"-I{source}", str(DRIVER)]
    subprocess.run([*command, "-o", str(folder / "driver")], check=True, env=WITHOUT_PRELOAD)
    shutil.rmtree(source)


@pytest.mark.deep("CPU kernels under sanitizers; tests of values and of threads ran without", minutes=0.5)
@needs_compiler
@pytest.mark.parametrize(
    ("sanitizer", "mistake", "report"),
    [("thread", "race", "data race"), ("address", "overrun", "heap-buffer-overflow")],
)
def test_no_sanitizer_finds_anything(once, sanitizer, mistake, report):
    name = fingerprint(" ".join([*FLAGS, sanitizer]), CSRC, DRIVER, Path(__file__))
    driver = once(f"threads_{sanitizer}-{name}", lambda folder: build(folder, sanitizer)) / "driver"

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**WITHOUT_PRELOAD, "TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run([driver, *arguments], env=environment, capture_output=True, text=True, timeout=300)

    clean = run()
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "done\n", "")
    wrong = run(mistake)
    assert wrong.returncode != 0 and report in wrong.stderr
