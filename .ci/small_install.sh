#!/usr/bin/env bash
# A machine that only predicts: build the wheel, install it alone with the extras cpu and dicom, and use it there.
# Prints the size of the installed packages and fails above 350 MB, or where a command fails or loads what it should not
# need. The model and its run come from `make demo`.   .ci/small_install.sh DEMO_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
demo=$(cd "${1:-demo}" && pwd)
python=${PYTHON:-python3}
uv=${UV-$(command -v uv || true)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -n "$uv" ]; then
  "$uv" build --quiet --wheel --out-dir "$work/dist"
  wheels=("$work"/dist/*.whl)
  "$uv" venv --quiet --python "$python" "$work/venv"
  "$uv" pip install --quiet --python "$work/venv/bin/python" "${wheels[0]}[cpu,dicom]"
else
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$work/dist" .
  wheels=("$work"/dist/*.whl)
  "$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet "${wheels[0]}[cpu,dicom]"
fi
"$work/venv/bin/python" - <<'EOF'
import importlib.util
import sys
import sysconfig
from pathlib import Path

folder = Path(sysconfig.get_path("purelib"))
ours = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in ("pip", "setuptools")]
size = sum(p.stat().st_size for p in ours) / 1e6
print(f"small install: {size:.0f} MB of packages (at most 350)")
heavy = [name for name in ("torch", "scipy", "sklearn", "h5py", "onnx") if importlib.util.find_spec(name)]
sys.exit(f"too large, or it has {heavy}" if size > 350 or heavy else 0)
EOF

cp -r "$demo/run" "$work/run"
cd "$work" # outside the checkout, so that nothing of it is imported
cxr="$work/venv/bin/cxrfast"
films="$demo/data/images"
"$cxr" doctor
"$cxr" verify run/model.fp32.onnx
"$cxr" info run/model.fp32.onnx
"$cxr" info run
"$cxr" predict run "$films" --out predictions.csv --device cpu
"$cxr" report run
"$cxr" compare run run >compare.txt
"$cxr" runs .
"$cxr" evaluate run "$demo/data" --out evaluation --device cpu --resamples 100
"$cxr" bench latency run/model.fp32.onnx --images "$films" --repeats 10 --device cpu
cmp <(cut -d, -f2- predictions.csv) <(cut -d, -f2- "$demo/predictions.csv") # the same to the last digit
needs_train() { # the words of a command that must end with one line naming the extra
  local code=0 said
  said=$("$cxr" "$@" 2>&1) || code=$?
  if [ "$code" -ne 2 ] || [ "$(printf '%s\n' "$said" | wc -l)" -ne 1 ] || ! grep -q "the extra train brings it" <<<"$said"; then
    echo "cxrfast $*: exit $code, and not one line that names the extra: $said"
    exit 1
  fi
}
said=$("$cxr" evaluate run "$demo/data" --out evaluation --recalibrate site.onnx 2>&1) && exit 1
grep -q "the extra recalibrate brings it" <<<"$said" || { echo "evaluate --recalibrate: $said"; exit 1; }
needs_train cache "$demo/data"
needs_train sweep
needs_train export run
needs_train explain run "$films" --out o.png
needs_train info "$demo/phantom.h5"
needs_train bench cache "$demo/data"
needs_train bench train x.h5
needs_train bench compare run/model.fp32.onnx --against torch
needs_train verify "$demo/phantom.h5"
echo "small install: predicts, evaluates, verifies, reports and measures; the rest names its extra"
