#!/usr/bin/env bash
# Gives 12,000 hostile inputs to everything that is read (YAML, JSONL, partial files, heatmaps), each in a process under
# limits of memory and time, and prints what came of them. Exit code 1 where an input had no clear answer; it is kept.
# Usage: bash launch/fuzz.sh [--inputs 12000] [--seed 0] [--readers config,task,...] [--replay FOLDER]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" tests/fuzz/fuzz.py "$@"
