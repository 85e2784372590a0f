#!/usr/bin/env bash
# `qkov run` under DeepSpeed's launcher: a rank for each GPU (or as many as RANKS says; two on a CPU).
# Usage: [RANKS=8] bash launch/deepspeed.sh CONFIG.yaml [section.key=value ...]
#        bash launch/deepspeed.sh configs/node8.yaml parallel.shard=zero3 output.dir=runs/first
# This launcher says nothing of stages: without parallel.shard=zero3 every rank holds the whole model.
# HOSTFILE names a file of `host slots=8` lines for several machines, which DeepSpeed reaches over ssh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment deepspeed
# On a CPU, DeepSpeed counts NUMA nodes for devices; --num_gpus overrules it. Its --bind_cores_to_rank needs numactl.
exec "$PYTHON" -m deepspeed.launcher.runner ${HOSTFILE:+--hostfile "$HOSTFILE"} --num_gpus "$(num_ranks)" \
    --no_local_rank --master_port "$(free_port)" --module qkov_dist run "$@"
