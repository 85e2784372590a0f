#!/usr/bin/env bash
# Random kills: runs of one process, ddp, fsdp, zero3, hybrid sharding, expert and context parallelism are killed at random moments
# and resumed until they finish; each must end in the right result. Prints how many were killed where; exits with 1
# where anything was at fault.
# Usage: bash launch/kills.sh [--kills 120 --seed 0 --cuts none,ddp,fsdp,zero3,hybrid,ep,cp | --seed S --story CUT-N]
#        bash launch/kills.sh --help
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment all
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONWARNINGS="ignore:resource_tracker" # ranks that were killed had no time to give back semaphores
exec "$PYTHON" tests/kills/kills.py "$@"
