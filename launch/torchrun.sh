#!/usr/bin/env bash
# `qkov run` under torchrun: on this machine a rank for each GPU (or as many as RANKS says; two on a CPU).
# Usage: [RANKS=8] bash launch/torchrun.sh CONFIG.yaml [section.key=value ...]
#        bash launch/torchrun.sh configs/node8.yaml parallel.tp=2 output.dir=runs/first
# Several machines: on each of them, with NODE_RANK=0 on the one that MASTER_ADDR names and 1, 2, ... on the others,
#        NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node bash launch/torchrun.sh CONFIG.yaml
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment ""
if [ "${NNODES:-1}" -gt 1 ]; then
    meeting=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    meeting=(--standalone)
fi
exec "$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$(num_ranks)" -m qkov_dist run "$@"
