#!/usr/bin/env bash
# Every GPU figure in one call, meant for less than 10 minutes, on a machine with one CUDA device. Results go to
# benchmarks/results/. PYTHON picks the interpreter; OUT, where set, receives a copy of each new result as soon as it is
# there. A driver that fails costs no other its figures; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device here" >&2; exit 2; }
began="$(mktemp)"
trap 'rm -f "$began"' EXIT
failed=0

run() {
  local driver="$1" done=0
  shift
  "$PYTHON" "benchmarks/$driver" "$@" || { done=1; echo "failed: $driver $*" >&2; }
  if [ -n "${OUT:-}" ]; then find benchmarks/results -name '*.json' -newer "$began" -exec cp {} "$OUT" ';'; fi
  return "$done"
}

# The headline first; last what takes longest to say least: compiling, then a fifth of the search, extrapolated.
run run_search.py --device cuda || failed=1
run run_cache.py --device cuda --count 512 --rounds 3 || failed=1
run run_inference_gpu.py || failed=1
run run_search.py --device cuda --compile --epochs 20 || echo "the figures above stand"
exit "$failed"
