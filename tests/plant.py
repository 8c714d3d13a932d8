"""Planted mistakes: one piece of a source file replaced once, for a test that must fail then."""

import re
import shutil
from pathlib import Path

from compiler import CSRC


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


def leave_out_halves(csrc: Path) -> None:
    """Of a kernel for each storage type, those for bfloat16 and float16."""
    for type_, name in (("BFloat16", "bf16"), ("Half", "fp16")):
        replace_once(csrc / "kernels" / "functors.h", f"    case DType::{type_}:\n      return f({name}());\n", "")


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

    float16 is loaded and stored as bfloat16 is, and float64 as float32 is, half as many to a vector. mse reads what the
    other losses of a difference read, and cross-entropy what focal reads; a loss with a softcap reads what
    it reads without one, and one of any gamma what it reads for a gamma of 2. Calls of what is left out give other
    results.
    """
    for type_, name in (("Half", "fp16"), ("Double", "double")):
        replace_once(csrc / "kernels" / "functors.h", f"    case DType::{type_}:\n      return f({name}());\n", "")
    in_double = "if (args.arithmetic == DType::Double) return run_strided_in<Functor, double>(result, args, stream);"
    replace_once(csrc / "cuda" / "pointwise.cuh", in_double, "")
    for name, functor in (
        ("l1", "L1"), ("smooth_l1", "SmoothL1"), ("huber", "Huber"), ("hinge_embedding", "HingeEmbedding"),
        ("soft_margin", "SoftMargin"), ("kl_div", "KlDiv"), ("kl_div_log_target", "KlDivLogTarget"),
        ("poisson_nll", "PoissonNll"), ("poisson_nll_rate", "PoissonNllRate"),
    ):  # fmt: skip
        replace_once(csrc / "losses" / "pointwise.h", f"X({name}, {functor})", f"X({name}, Mse)")
    replace_once(csrc / "losses" / "softmax.h", "X(focal, Focal)", "X(focal, CrossEntropy)")
    for old, new in (
        ("using Specialised = Smooth;", "using Specialised = typename Smooth::Specialised;"),
        ("using Specialised = SoftCrossEntropyWith<T, Unchanged<T>>;", ""),
        ("using Specialised = LogProbsWith<T, SumNone>;", ""),
    ):
        replace_once(csrc / "losses" / "softmax.h", old, new)
    of_gamma = "if (Functor::applies(params)) return f(Functor::specialised(params), storage);"
    replace_once(csrc / "kernels" / "functors.h", of_gamma, "")
