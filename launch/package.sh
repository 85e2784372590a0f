#!/usr/bin/env bash
# Builds the package, installs the wheel into an empty environment, and uses it in an empty folder, far from a checkout:
# demo, run, report without and with the extra, the plan of a described model. Leaves nothing behind.
# Usage: bash launch/package.sh [folder for the wheel and the source archive]
# TORCH_SPEC chooses the torch; PYTHON3 the Python.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
dist="$(realpath -m "${1:-$work/dist}")"
unset PYTHONPATH
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

say() { echo "launch: $*" >&2; }

expect() {
    for file in "$@"; do
        if ! [ -s "$file" ]; then
            say "expected a file $file"
            exit 1
        fi
    done
}

say "building"
"$(find_python)" -m venv "$work/builder"
"$work/builder/bin/python" -m pip install --quiet 'build>=1.2'
"$work/builder/bin/python" -m build --outdir "$dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
wheels=("$dist"/qkov_dist-*.whl)
wheel="${wheels[0]}"

say "installing $(basename "$wheel") into an empty environment"
"$(find_python)" -m venv "$work/environment"
PYTHON="$work/environment/bin/python" PATH="$work/environment/bin:$PATH"
"$PYTHON" -m pip install --quiet "${TORCH_SPEC:-torch==2.13.0}"
"$PYTHON" -m pip install --quiet "$wheel"
ensure_demo_model

mkdir "$work/away"
cd "$work/away"
"$PYTHON" -c '
import sys
import qkov_dist
assert qkov_dist.__file__.startswith(sys.prefix), qkov_dist.__file__'
qkov --help >help.txt
qkov demo --quiet --samples 3 --max-tokens 48 --output demo
expect help.txt demo/heatmap.h5 demo/report.html

cat >small.yaml <<YAML
model: {path: $(find "$work/environment" -name '*.gguf'), dtype: float32}
tasks:
  - {name: sums, path: "builtin:arithmetic", max_samples: 3, max_tokens: 48}
  - {name: code, path: "builtin:python", max_samples: 3, max_tokens: 48}
metric: {layers: 0-1}
statistics: {permutations: 100}
output: {dir: small}
YAML
qkov run --quiet small.yaml
rm small/report.html
qkov report small
expect small/heatmap.h5 small/report.html small/report/heads.csv
qkov plan small.yaml model.path=builtin:llama-3-405b model.dtype=bfloat16 parallel.tp=8 parallel.shard=fsdp \
    --world-size 64 --hardware H100 --samples 32 --tokens 512

say "the same with the extra for figures and labelled arrays"
"$PYTHON" -m pip install --quiet "$wheel[report]"
qkov report small
expect small/report/heatmaps.pdf small/report/heatmaps.png
"$PYTHON" -c '
from qkov_dist import load_heatmap
heatmap = load_heatmap("small")
assert heatmap.to_pandas().shape[0] == heatmap.to_xarray().sizes["layer"] * 24, heatmap'
say "$(basename "$wheel") is whole"
