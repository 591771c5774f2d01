#!/usr/bin/env bash
# Every GPU figure in one call, on a machine with one CUDA device. Results go to benchmarks/results/.
# PYTHON picks the interpreter; OUT, where set, receives a copy of the results.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device here" >&2; exit 2; }
"$PYTHON" benchmarks/run_cache.py --device cuda --count 512 --rounds 5
"$PYTHON" benchmarks/run_search.py --device cuda
"$PYTHON" benchmarks/run_search.py --device cuda --compile || echo "the compiled search did not run; the figures above stand"
"$PYTHON" benchmarks/run_inference_gpu.py
if [ -n "${OUT:-}" ]; then cp benchmarks/results/*.json "$OUT"/; fi
