#!/usr/bin/env bash
# Everything that only a GPU can tell, in the current environment; stops at the first failure.
# FUSEDLOSS_CONFORMANCE names a script that takes --device; PYTHON another python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

echo "== the whole suite, its tensors on the GPU"
"$python" -m pytest -x --deep --device cuda --ignore tests/gpu

echo "== what only a GPU can show"
"$python" -m pytest -x -rs --deep tests/gpu

conformance=${FUSEDLOSS_CONFORMANCE:-../shared/conformance.py}
if [ -f "$conformance" ]; then
  echo "== torch's own samples"
  # Reported, not judged: it succeeds only where every loss of torch.nn is there, and some are still to come.
  "$python" "$conformance" --device cuda || true
elif [ -n "${FUSEDLOSS_CONFORMANCE:-}" ]; then
  echo "FUSEDLOSS_CONFORMANCE: no file $conformance" >&2
  exit 1
else
  echo "== torch's own samples: skipped, no $conformance"
fi

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer, $tool"
    # Without torch's caching, each tensor is an allocation of its own and a read beyond it is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -x -p no:cacheprovider tests/gpu -k test_every_path_on_few_rows
  done
else
  echo "== compute-sanitizer: skipped, not on this machine"
fi

echo "== speed"
"$python" -m benchmarks --device cuda "$@"
