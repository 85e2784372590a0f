#!/usr/bin/env bash
# Are the p-values right, and how many samples do they take? Halves of one task, then arithmetic against Python code.
# Writes tests/studies/results/*.{json,md} and .github/images/{calibration,power}.png.
# Usage: bash launch/calibrate.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
ensure_demo_model
export PYTHONPATH="$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" tests/studies/calibration_page.py
exec "$PYTHON" tests/studies/power.py
