"""What reads the output of nvcc: it refuses what it does not understand, and shows what differs."""

import shutil

import nvcc
import pytest


def test_a_log_of_unknown_wording_is_refused():
    log = (
        "ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z5cleanPf\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 10 registers, used 0 barriers\n"
    )
    assert [function.registers for function in nvcc.parse(log)] == [10]
    for other in ("", log.replace("spill loads", "reloads"), log.replace("Used", "Uses")):
        with pytest.raises(AssertionError, match="not understood"):
            nvcc.parse(other)


def test_a_log_of_several_architectures_is_taken_apart():
    kernel = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function '_Z1aPf' for 'sm_{}'\nsaid of {}\n"
    log = "".join(kernel.format(*both) for both in (("80", "one"), ("90", "two"), ("90", "three")))
    parts = {name: nvcc.said_of(name, log) for name in ("sm_80", "sm_90", "sm_100")}
    assert "one" in parts["sm_80"] and "two" not in parts["sm_80"]
    assert "one" not in parts["sm_90"] and "two" in parts["sm_90"] and "three" in parts["sm_90"]
    assert parts["sm_100"] == ""


def test_names_are_shortened():
    space = "fusedloss::cuda::(anonymous namespace)::"
    names = {
        f"void {space}forward_rows<fusedloss::cuda::bf16, fusedloss::cuda::CrossEntropy<float>, true>"
        "(fusedloss::cuda::CrossEntropy<float>, fusedloss::CudaSoftmaxArgs)": (
            "forward_rows<bf16, CrossEntropy<float>, true>"
        ),
        f"void {space}pointwise_kernel<(fusedloss::PointwiseResult)3, float, A<B<float> > >(A<B<float> >)": (
            "pointwise_kernel<Grad, float, A<B<float>>>"
        ),
        "clean(float*)": "clean",
    }
    assert [nvcc.shortened(name) for name in names] == list(names.values())


def test_a_table_that_differs_is_shown():
    counts = {"a<float, true>": (30, 31, 32), "b": (100, 101, 102)}
    counted_by, sources, committed = nvcc.read_table(nvcc.table("13.0.88", "a1b2", counts))
    assert (counted_by, sources, committed) == ("13.0.88", "a1b2", counts) and not nvcc.differences(committed, counts)
    message = nvcc.differences(committed, {"a<float, true>": (30, 31, 33), "c": (1, 2, 3)})
    assert message.splitlines()[:3] == [
        "a<float, true>: (30, 31, 32) in the table, (30, 31, 33) now",
        "b: (100, 101, 102) in the table, not there now",
        "c: not there in the table, (1, 2, 3) now",
    ]
    assert "python tests/kernels/nvcc.py --write" in message


def test_a_table_is_of_the_code_and_not_of_its_comments(monkeypatch, tmp_path):
    shutil.copytree(nvcc.CSRC, tmp_path, dirs_exist_ok=True)
    before = nvcc.fingerprint()
    monkeypatch.setattr(nvcc, "CSRC", tmp_path)
    assert nvcc.fingerprint() == before
    header = tmp_path / "losses" / "huber.h"
    header.write_text("// said of it\n\n")
    with_a_file = nvcc.fingerprint()
    header.write_text("// said otherwise\n")
    assert nvcc.fingerprint() == with_a_file != before
    header.write_text("int x;  // said of it\n")
    assert nvcc.fingerprint() not in (with_a_file, before)
