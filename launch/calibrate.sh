#!/usr/bin/env bash
# Are the p-values right, do the intervals cover, and how many samples does it take? Halves of one task, gradients whose
# true overlap or effect is known, then arithmetic against Python code.
# Writes tests/studies/results/*.{json,md} and .github/images/{calibration,power}.png.
# Usage: bash launch/calibrate.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
ensure_demo_model
export PYTHONPATH="$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" tests/studies/calibration_page.py
"$PYTHON" tests/studies/intervals.py
"$PYTHON" tests/studies/calibrated_effects.py
"$PYTHON" tests/studies/calibrated_comparisons.py
exec "$PYTHON" tests/studies/power.py
