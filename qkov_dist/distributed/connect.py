"""How ranks speak: torch.distributed (gloo or nccl) or MPI; nothing else knows these.

How one rank's failure reaches the others is said in :mod:`qkov_dist.distributed.failures`.

Who started this process, and where its ranks meet: read from the environment alone.

    torchrun, accelerate, deepspeed   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, all of them set
    mpirun of MPICH and Intel MPI     PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    mpirun of Open MPI                OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
    srun                              SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST

A batch script of Slurm has SLURM_NTASKS and SLURM_PROCID too, but is one process: only a step has its own task count.
PALS and Flux give PMI_RANK and PMI_SIZE, and a rank's place on its node under names of their own.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from qkov_dist.errors import QkovError

from .failures import ROOT, Watch
from .world import Alone, MpiWorld, SharedError, TorchWorld, World, timeout_seconds


@contextmanager
def connected() -> Iterator[World]:
    """Connect the ranks that the launcher started; one process where it started one.

    A process group that is there already is used and left alone.

    Raises:
        QkovError: where the ranks do not find each other, or one fails: on that rank its own error, on the others one
            that names it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with _watch().failures_named():
            yield _default_world()
        return
    if launched_size(os.environ) == 1:
        yield Alone()
        return
    os.environ.update(rendezvous(os.environ))
    timeout = datetime.timedelta(seconds=timeout_seconds())
    with _same_patience(timeout):
        _join(timeout)
        watch = _watch(ends_process=True)
        try:
            with watch.failures_named():
                yield _default_world()
                torch.distributed.barrier()
        finally:
            try:
                torch.distributed.destroy_process_group()
            finally:
                watch.close()


def current() -> World:
    """The ranks that are connected now; one process where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _default_world()
    return Alone()


@contextmanager
def step() -> Iterator[World]:
    """A call of the Python API that all ranks make; within another one, a part of it.

    Where a rank fails by its own error, the others raise one that names it, or their processes end with that message
    where they are in a call that no longer comes to an end. An error that ends a rank's process between two calls is
    named by the next call of the others.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or _Steps.inside:
        yield current()
        return
    _Steps.tell_uncaught()
    _Steps.number += 1
    watch = _watch(f"{ROOT}/step{_Steps.number}", ends_process=True)
    _Steps.inside = True
    try:
        with watch.failures_named():
            yield _default_world()
    finally:
        _Steps.inside = False
        watch.close()


class _Steps:
    """What a process knows of its calls: how many there were, and whether one is under way."""

    number, inside, told = 0, False, False

    @classmethod
    def tell_uncaught(cls) -> None:
        """From now on, leave a note of an error that ends the process."""
        if cls.told:
            return
        cls.told, show = True, sys.excepthook

        def leave_note(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            if torch.distributed.is_initialized():
                _watch().leave_note(error)
            show(kind, error, trace)

        sys.excepthook = leave_note


@contextmanager
def connected_by_mpi() -> Iterator[World]:
    """The ranks of ``mpirun``, without a process group; one process where one was started.

    An error that the ranks do not share (see :func:`together`) is printed and ends them all, for the others may wait.

    Raises:
        QkovError: for several ranks without mpi4py, or with one that does not see them.
    """
    started = launched_size(os.environ)
    if started == 1:
        yield Alone()
        return
    world = MpiWorld(_mpi_of(started))
    try:
        yield world
    except SharedError:
        raise
    except BaseException as error:
        expected = isinstance(error, QkovError)
        print(f"qkov: rank {world.rank}: {error if expected else repr(error)}", file=sys.stderr, flush=True)
        world.comm.Abort(2 if expected else 1)
        raise


@contextmanager
def _same_patience(timeout: datetime.timedelta) -> Iterator[None]:
    """Have groups that libraries make (FSDP, DeepSpeed) wait as long as ours; by default they wait half an hour."""
    module, names = torch.distributed.distributed_c10d, ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, timeout)
        yield
    finally:
        for name in names:
            setattr(module, name, before[name])


def _join(timeout: datetime.timedelta) -> None:
    """Make the process group of all ranks."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(_own_gpu())
    interface = f"{backend.upper()}_SOCKET_IFNAME"
    check_interface(interface, os.environ)
    try:
        torch.distributed.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        raise QkovError(
            f"rank {os.environ['RANK']}",
            expected=f"{os.environ['WORLD_SIZE']} ranks to meet at one free port of rank 0's node",
            got=f"{str(error).splitlines()[0]} ({', '.join(f'{name}={os.environ.get(name)}' for name in names)})",
            remedy="Start all ranks, with another MASTER_PORT where this one is in use"
            + (f", and {interface}={os.environ[interface]} left out." if interface in os.environ else "."),
        ) from error


def _own_gpu() -> int:
    """The GPU of this rank among those that it sees, which may be its own alone."""
    local, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if seen == 1 and "SLURM_LOCALID" in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task=1; transformers and DeepSpeed read it too
        return 0
    if local >= seen:
        raise QkovError(
            f"rank {os.environ['RANK']}",
            expected="a GPU for each rank of a node",
            got=f"{seen} for local rank {local}",
            remedy="Start as many ranks as there are GPUs, or set CUDA_VISIBLE_DEVICES= to run on the CPU.",
        )
    return local


def _mpi_of(started: int) -> Any:
    """MPI's communicator of all ranks, proved to have the size that the launcher says."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise QkovError(
            "mpirun",
            expected="mpi4py, to merge over MPI",
            got=str(error),
            remedy="Run `pip install 'qkov-dist[mpi]'`, or merge in one process without mpirun.",
        ) from error
    if MPI.COMM_WORLD.Get_size() != started:
        raise QkovError(
            "MPI",
            expected=f"{started} ranks, as many as were started",
            got=str(MPI.COMM_WORLD.Get_size()),
            remedy="Start one process, or several with the mpirun (or srun --mpi=...) of the MPI that mpi4py uses.",
        )
    return MPI.COMM_WORLD


def _watch(root: str = ROOT, *, ends_process: bool = False) -> Watch:
    return Watch(
        torch.distributed.distributed_c10d._get_default_store(),
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        root,
        store_is_of_rank_0=os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true",
        ends_process=ends_process,
    )


def _default_world() -> TorchWorld:
    on_gpu = torch.distributed.get_backend() == "nccl"
    return TorchWorld(None, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))


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
