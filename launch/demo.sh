#!/usr/bin/env bash
# The main job on an empty machine: SmolLM2-135M, arithmetic against Python code, a heatmap file and its summary.
# Usage: bash launch/demo.sh [arguments of `qkov demo`, such as --samples 8]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment report
ensure_demo_model
exec "$PYTHON" -m qkov_dist demo "$@"
