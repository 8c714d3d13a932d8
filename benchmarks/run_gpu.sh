#!/usr/bin/env bash
# Everything that only a GPU can tell, in the current environment, what tells most first. A stage that fails stops none
# of the others; the last lines name those that failed.
#
#     bash benchmarks/run_gpu.sh [STAGE...] [-- ARGUMENT OF benchmarks...]
#
# FUSEDLOSS_CONFORMANCE names a script that takes --device; PYTHON another python3; GPU_WORKERS how many processes share
# the GPU in the tests (default: 4).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
conformance=${FUSEDLOSS_CONFORMANCE:-../shared/conformance.py}
# Each worker is a process: one whose device fails takes no other's tests with it, and another takes its place.
workers=(-n "${GPU_WORKERS:-4}" --dist worksteal)

# Right values of every kernel at real sizes.
values() { "$python" -m pytest --deep tests/gpu -k test_value_and_gradient "${workers[@]}"; }

# What else only a GPU shows: streams, graphs, launches, memory, bad targets.
gpu() { "$python" -m pytest -rs --deep tests/gpu -k "not test_value_and_gradient" "${workers[@]}"; }

# The whole suite, its tensors on the GPU.
suite() { "$python" -m pytest --deep --device cuda --ignore tests/gpu "${workers[@]}"; }

# torch's own samples.
samples() {
  if [ ! -f "$conformance" ]; then
    echo "no file $conformance"
    [ -z "${FUSEDLOSS_CONFORMANCE:-}" ]
  else
    PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" "$conformance" --device cuda
  fi
}

# Reads and writes out of bounds, and races. Without torch's caching each tensor is an allocation of its own, so that a
# read beyond it is seen.
sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "not on this machine"
    return
  fi
  local tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -x -p no:cacheprovider tests/gpu -k test_every_path_on_few_rows || return
  done
}

# Written after each case: a run that is cut short leaves what it has.
speed() { "$python" -m benchmarks --device cuda "${arguments[@]}"; }

stages=() arguments=() failed=()
while [ $# -gt 0 ]; do
  if [ "$1" = -- ]; then
    arguments=("${@:2}")
    break
  fi
  stages+=("$1")
  shift
done
[ ${#stages[@]} -gt 0 ] || stages=(values gpu suite samples speed sanitizer)
for stage in "${stages[@]}"; do
  echo "== $stage"
  SECONDS=0
  "$stage" || failed+=("$stage")
  echo "== $stage took $SECONDS s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
