#!/usr/bin/env bash
# `qkov run` under mpirun: a rank for each GPU (or as many as RANKS says; two on a CPU), on this machine.
# Usage: [RANKS=8] bash launch/mpirun.sh CONFIG.yaml [section.key=value ...]
#        bash launch/mpirun.sh configs/node8.yaml parallel.shard=fsdp output.dir=runs/first
# MPI only starts the ranks: they speak through torch.distributed, and need no mpi4py. MPIRUN names another mpirun.
# Several machines: start `mpirun -n 16 qkov run CONFIG.yaml` with your MPI's list of hosts, and MASTER_ADDR set for all
# ranks to the host of rank 0 (-genv MASTER_ADDR HOST for MPICH and Intel MPI, -x MASTER_ADDR=HOST for Open MPI).
# Partial files are merged over MPI by `mpirun -n 4 qkov merge DIR`, which does need mpi4py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment mpi
MPIRUN="${MPIRUN:-$(dirname "$PYTHON")/mpirun}"
if [ ! -x "$MPIRUN" ]; then MPIRUN=mpirun; fi
MASTER_PORT="$(free_port)"
export MASTER_PORT
exec "$MPIRUN" -n "$(num_ranks)" "$PYTHON" -m qkov_dist run "$@"
