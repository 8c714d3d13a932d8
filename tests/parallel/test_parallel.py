"""Losses over a sharded vocabulary, in processes that meet over gloo, which check what is in the files of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler import ROOT
from marks import needs_extension, on_cpu_alone

HERE = Path(__file__).parent
SMOKE = ["few_values", "collectives", "errors"]
VALUES = ["values", "long_rows", "shapes", "one_class", "masks", "edges", "natively"]
CALLS = ["collectives", "in_blocks", "accounting", "groups", "memory", "errors", "situations"]
DTENSORS = ["placements", "labels_of_dtensors", "weights_of_dtensors"]
DERIVATIVES = ["derivatives", "derivatives_of_factors", "compiled", "compiled_placements"]

DIVERGENCE_SMOKE = ["few_values", "errors"]
DIVERGENCE = ["values", "shapes", "masks", "natively", "placements", "errors"]

LINEAR_SMOKE = ["few_values", "errors"]
LINEAR = [
    "values", "shapes", "edges", "scaled_means", "collectives", "parts_of_the_input", "frozen", "in_blocks", "memory",
    "situations", "placements", "errors",
]  # fmt: skip

pytestmark = [
    needs_extension,
    on_cpu_alone("the processes meet over gloo and compute on the CPU"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]


def run(ranks: int, folder: Path, checks: list[str], file: str = "vocabulary_ranks.py") -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(HERE / file), str(ranks), str(folder), *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_ranks(tmp_path):
    run(2, tmp_path, SMOKE)


@pytest.mark.deep("sharded vocabularies on 3 and 8 ranks; a few calls of two ranks ran", minutes=0.5)
@pytest.mark.parametrize("ranks", [3, 8])
def test_ranks(tmp_path, ranks):
    run(ranks, tmp_path, VALUES + CALLS + DTENSORS)


@pytest.mark.deep("sharded vocabularies: second derivatives and torch.compile on 2 ranks", minutes=1)
def test_derivatives_and_compiled(tmp_path):
    run(2, tmp_path, DERIVATIVES)


def test_two_ranks_of_a_head(tmp_path):
    run(2, tmp_path, LINEAR_SMOKE, "linear_ranks.py")


@pytest.mark.deep("sharded heads on 3 ranks; a few calls of two ranks ran", minutes=1)
def test_ranks_of_a_head(tmp_path):
    run(3, tmp_path, LINEAR, "linear_ranks.py")


@pytest.mark.deep("sharded heads: second derivatives and torch.compile on 2 ranks", minutes=0.5)
def test_derivatives_of_a_head(tmp_path):
    run(2, tmp_path, ["derivatives", "derivatives_of_factors", "compiled"], "linear_ranks.py")


def test_two_ranks_of_a_divergence(tmp_path):
    run(2, tmp_path, DIVERGENCE_SMOKE, "divergence_ranks.py")


@pytest.mark.deep("sharded divergences on 4 ranks; a few calls of two ranks ran", minutes=0.2)
def test_ranks_of_a_divergence(tmp_path):
    run(4, tmp_path, DIVERGENCE, "divergence_ranks.py")


@pytest.mark.deep("sharded divergences: second derivatives, torch.compile and memory on 2 ranks", minutes=0.3)
def test_derivatives_of_a_divergence(tmp_path):
    run(2, tmp_path, ["derivatives", "compiled", "memory"], "divergence_ranks.py")


def test_two_ranks_of_dtensors(tmp_path):
    run(2, tmp_path, ["layouts", "errors"], "placed_ranks.py")


@pytest.mark.deep("DTensors in every loss on 4 ranks; a few calls of two ranks ran", minutes=0.5)
def test_ranks_of_dtensors(tmp_path):
    run(4, tmp_path, ["pointwise", "softmax", "layouts", "compiled", "errors"], "placed_ranks.py")


@pytest.mark.deep("a sharded head on 8 ranks; 2 and 3 ranks ran more", minutes=0.3)
def test_eight_ranks_of_a_head(tmp_path):
    run(8, tmp_path, ["values", "collectives", "in_blocks"], "linear_ranks.py")


@pytest.mark.deep("training on a mesh of 2 by 2: data and tensor parallelism together; each ran alone", minutes=0.2)
def test_a_mesh_of_data_and_tensor_parallelism(tmp_path):
    run(4, tmp_path, ["averaged", "fsdp2"], "trained_ranks.py")
