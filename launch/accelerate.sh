#!/usr/bin/env bash
# `qkov run` under `accelerate launch`: a rank for each GPU (or as many as RANKS says; two on a CPU).
# Usage: [RANKS=8] bash launch/accelerate.sh {ddp|fsdp2|zero3|FILE} CONFIG.yaml [section.key=value ...]
#        bash launch/accelerate.sh fsdp2 configs/node8.yaml output.dir=runs/first
# The first argument is a file of configs/accelerate/, or one that `accelerate config` wrote. With parallel.shard: auto,
# the run is sharded as this file says.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
strategy="${1:?expected ddp, fsdp2, zero3 or a file of accelerate config, got nothing}"
shift
if [ "$strategy" = zero3 ]; then ensure_environment deepspeed; else ensure_environment ""; fi
if [ -f "configs/accelerate/$strategy.yaml" ]; then strategy="configs/accelerate/$strategy.yaml"; fi
exec "$PYTHON" -m accelerate.commands.launch --config_file "$strategy" --num_processes "$(num_ranks)" \
    -m qkov_dist run "$@"
