"""Who started this process, and where its ranks meet: read from the environment alone.

    torchrun, accelerate, deepspeed   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, all of them set
    mpirun of MPICH and Intel MPI     PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    mpirun of Open MPI                OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
    srun                              SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST

A batch script of Slurm has SLURM_NTASKS and SLURM_PROCID too, but is one process: only a step has its own task count.
PALS and Flux give PMI_RANK and PMI_SIZE, and a rank's place on its node under names of their own.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from qkov_dist.errors import QkovError

DEFAULT_PORT = 29500


class _Names(NamedTuple):
    """What a launcher calls a rank's place, the number of ranks, and the same within the rank's node."""

    rank: str
    size: str
    local_rank: str
    local_size: str


TORCH = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

LAUNCHERS = (
    TORCH,
    _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Names("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)

LOCAL_RANKS = ("SLURM_LOCALID", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID")  # where the launcher's own name is not set

LOCAL_SIZES = ("PALS_LOCAL_SIZE",)


def launched_size(environment: Mapping[str, str]) -> int:
    """How many ranks the launcher started, before they are connected; 1 without a launcher.

    Raises:
        QkovError: for a rank or a number of ranks that is none.
    """
    names = _launcher(environment)
    read = (*TORCH, names.rank, names.size, names.local_rank, *LOCAL_RANKS) if names else ("RANK", "WORLD_SIZE")
    numbers = {name: _number(environment, name) for name in read if name in environment}
    if names is None:
        return 1
    if not numbers[names.rank] < numbers[names.size]:
        raise QkovError(
            names.rank,
            expected=f"a rank below {names.size} ({environment[names.size]})",
            got=environment[names.rank],
            remedy="Let the launcher set these variables, or unset both of them.",
        )
    return numbers[names.size]


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch.distributed reads to find the other ranks: the variables that torchrun would set.

    Args:
        environment: That of a process that a launcher started; what is set already is kept.

    Raises:
        QkovError: where the ranks are on several nodes and nothing says where rank 0 is; as `launched_size` does.
    """
    names = _launcher(environment)
    launched_size(environment)
    if names is None:
        return {}
    found = {
        "RANK": environment[names.rank],
        "WORLD_SIZE": environment[names.size],
        "LOCAL_RANK": _first(environment, (names.local_rank, *LOCAL_RANKS), "0"),
    }
    if not environment.get("MASTER_ADDR"):
        found["MASTER_ADDR"] = _address_of_rank_0(names, environment)
    if not environment.get("MASTER_PORT"):
        job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        found["MASTER_PORT"] = str(DEFAULT_PORT + job % 1000)  # jobs that share a node seldom share a port
    return found


def first_host(nodes: str) -> str:
    """The first name of Slurm's compressed list of nodes: ``gpu-[03-07,12],login`` -> ``gpu-03``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def check_interface(variable: str, environment: Mapping[str, str]) -> None:
    """Refuse a variable that names network interfaces of which this node has none.

    Gloo takes names; NCCL takes the beginnings of names, names after ``=``, and all but some after ``^``.
    """
    text, there = environment.get(variable, ""), [name for _, name in socket.if_nameindex()]
    whole = text.startswith("=") or variable.startswith("GLOO")
    wanted = [name for name in text.removeprefix("=").split(",") if name]
    if not wanted or text.startswith("^"):
        return
    if not any(name == one if whole else name.startswith(one) for name in there for one in wanted):
        raise QkovError(
            variable,
            expected=f"a network interface of this node ({', '.join(there)})",
            got=text,
            remedy="Name one over which the ranks reach each other, or leave it out.",
        )


def _launcher(environment: Mapping[str, str]) -> _Names | None:
    return next((names for names in LAUNCHERS if {names.rank, names.size} <= environment.keys()), None)


def _number(environment: Mapping[str, str], name: str) -> int:
    least, text = int("SIZE" in name or "NUM" in name), environment[name].strip()
    if not text.isdecimal() or int(text) < least:
        raise QkovError(
            name,
            expected=f"a whole number of at least {least}, as a launcher sets it",
            got=repr(environment[name]),
            remedy="Let the launcher set it, or unset it to run as one process.",
        )
    return int(text)


def _first(environment: Mapping[str, str], names: tuple[str, ...], otherwise: str) -> str:
    """The first of several variables that is set."""
    return next((environment[name] for name in names if name in environment), otherwise)


def _address_of_rank_0(names: _Names, environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    here = _first(environment, (names.local_size, *LOCAL_SIZES), environment[names.size])
    if int(environment.get("FLUX_JOB_NNODES") or 1) > 1:
        here = "some"
    if here != environment[names.size]:
        raise QkovError(
            "MASTER_ADDR",
            expected="the address of rank 0's node, since the ranks are on several",
            got=f"nothing, with {here} of {environment[names.size]} ranks on this node",
            remedy="Set it for all ranks: mpirun -genv MASTER_ADDR HOST (MPICH) or -x MASTER_ADDR=HOST (Open MPI).",
        )
    return "127.0.0.1"
