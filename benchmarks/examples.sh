#!/usr/bin/env bash
# Measures what single programs show, for the tables and the picture that are made of it: some minutes of two cores, on
# which nothing else should run. Then `make report` writes the documents.
#
#     bash benchmarks/examples.sh [NAME...]
#
# PYTHON names another python3. What cannot run, because a package is missing, is named at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
folder=benchmarks/results/examples

declare -A programs=(
  [demo]="examples/demo.py --picture build/demo.png"
  [transformers-trainer]="examples/transformers_trainer.py"
  [distillation]="examples/distillation.py"
  [adoption]="-m benchmarks.adoption"
  [linear-memory]="-m benchmarks.linear_memory"
  [pages]="-m benchmarks.pages"
  [sharded]="-m benchmarks.sharded"
  [sharded-scale]="-m benchmarks.sharded_scale"
)
names=("$@") failed=()
[ ${#names[@]} -gt 0 ] || names=(demo transformers-trainer distillation adoption linear-memory pages sharded sharded-scale)
machine=$("$python" -c "from benchmarks import machine, results
told = machine.facts('cpu')
print(results.slug(told['device'] + ' ' + told['instruction set']))") || exit
mkdir -p build
for name in "${names[@]}"; do
  echo "== $name"
  SECONDS=0
  # shellcheck disable=SC2086  # a program and its arguments
  "$python" ${programs[$name]} --output "$folder/$machine-$name.json" || failed+=("$name")
  echo "== $name took $SECONDS s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
