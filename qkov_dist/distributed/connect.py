"""How ranks speak: torch.distributed (gloo, NCCL) or MPI; nothing else knows these.

Who started them is read in :mod:`qkov_dist.distributed.launchers`; how one rank's failure reaches the others is said in
:mod:`qkov_dist.distributed.failures`.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from qkov_dist.errors import QkovError

from .failure_notes import ROOT
from .failures import Watch
from .launchers import check_interface, launched_size, rendezvous
from .meeting import join, launchers_store, under
from .shared_errors import SharedError
from .world import Alone, MpiWorld, TorchWorld, World, timeout_seconds

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


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
            yield TorchWorld.of()
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
                _refuse_shared_gpu()
                yield TorchWorld.of()
                torch.distributed.barrier()
        finally:
            try:
                torch.distributed.destroy_process_group()
            finally:
                watch.close()


def current() -> World:
    """The ranks that are connected now; one process where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return TorchWorld.of()
    return Alone()


@contextmanager
def step(group: Any = None) -> Iterator[World]:
    """A call of the Python API that all ranks make; within another one, a part of it.

    Where a rank fails by its own error, the others raise one that names it, or their processes end with that message
    where they are in a call that no longer comes to an end. An error that ends a rank's process between two calls is
    named by the next call of the others.

    Args:
        group: A process group of torch.distributed whose ranks alone make the call; by default all ranks do.

    Raises:
        QkovError: on a rank outside the group.
    """
    if _Steps.inside is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield _Steps.inside or Alone()
        return
    world = _world_of(group)
    _Steps.tell_uncaught()
    members = tuple(world.names)
    _Steps.numbers[members] = number = _Steps.numbers.get(members, 0) + 1
    place = "" if group is None else f"/of{'-'.join(map(str, members))}"
    watch = _watch(f"{ROOT}{place}/step{number}", ends_process=True, ranks=members)
    _Steps.inside = world
    try:
        with watch.failures_named():
            yield world
    finally:
        _Steps.inside = None
        watch.close()


class _Steps:
    """What a process knows of its calls: how many each group made, which is under way, whether errors are told."""

    numbers: ClassVar[dict[tuple[int, ...], int]] = {}
    inside: ClassVar[World | None] = None
    told: ClassVar[bool] = False

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
        if _store_is_of_launcher():
            _join_by_launcher(backend, timeout)
        else:
            torch.distributed.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError, QkovError) as error:
        raise _never_met(interface, error) from error


def _join_by_launcher(backend: str, timeout: datetime.timedelta) -> None:
    """The same in the store that the launcher keeps from start to start."""
    rank, size, seconds = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout.total_seconds()
    end = time.monotonic() + seconds
    store = launchers_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), seconds)

    def init(place: Any) -> None:
        torch.distributed.init_process_group(backend, store=place, rank=rank, world_size=size, timeout=timeout)

    join(store, rank, size, end, init)


def _store_is_of_launcher() -> bool:
    """Whether the store lives in torchrun's agent, and not in rank 0's process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"


def _never_met(interface: str, error: Exception) -> QkovError:
    """What ranks are told that did not meet: where they looked, and over which network."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", interface)
    found = error.parts["got"] if isinstance(error, QkovError) else str(error).splitlines()[0]
    there = ", ".join(name for _, name in socket.if_nameindex())
    over = f"{interface} left out" if interface in os.environ else f"{interface} set"
    return QkovError(
        f"rank {os.environ['RANK']}",
        expected=f"{os.environ['WORLD_SIZE']} ranks to meet at one free port of rank 0's node",
        got=f"{found} ({', '.join(f'{name}={os.environ.get(name)}' for name in names)})",
        remedy=f"Start all ranks, with another MASTER_PORT where this one is in use, and with {over} where nodes do "
        f"not reach each other over the network that is taken by default (this one has {there}).",
    )


def _own_gpu() -> int:
    """The GPU of this rank among those that it sees, which may be its own alone."""
    local, seen = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if seen == 1 and ("SLURM_LOCALID" in os.environ or _one_is_named()):
        os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task=1; transformers and DeepSpeed read it too
        return 0
    if local >= seen:
        raise _no_gpu(f"{seen} for local rank {local}")
    return local


def _one_is_named() -> bool:
    """Whether a variable gives this process one device alone, as each rank of a node may have its own."""
    return any(len(os.environ.get(name, "").split(",")) == 1 and os.environ.get(name) for name in VISIBLE)


def _refuse_shared_gpu() -> None:
    """Refuse two ranks on one GPU, which NCCL would in words of its own; asked where each sees one alone."""
    if not torch.cuda.is_available() or torch.cuda.device_count() > 1:
        return
    mine, device = str(torch.distributed.get_rank()), torch.cuda.get_device_properties(0).uuid
    store = torch.distributed.distributed_c10d._get_default_store()
    if (other := store.compare_set(f"qkov/gpu/{socket.gethostname()}/{device}", "", mine).decode()) != mine:
        raise _no_gpu(f"that of rank {other} for rank {mine} too")


def _no_gpu(got: str) -> QkovError:
    return QkovError(
        f"rank {os.environ['RANK']}",
        expected="a GPU for each rank of a node",
        got=got,
        remedy="Start as many ranks as there are GPUs, or set CUDA_VISIBLE_DEVICES= to run on the CPU.",
    )


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


def _watch(root: str = ROOT, *, ends_process: bool = False, ranks: Sequence[int] | None = None) -> Watch:
    store = torch.distributed.distributed_c10d._get_default_store()
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # notes of an earlier one are in a launcher's store still
    return Watch(
        under(f"start{start}", store),
        torch.distributed.get_rank(),
        range(torch.distributed.get_world_size()) if ranks is None else ranks,
        root,
        store_is_of_rank_0=not _store_is_of_launcher(),
        ends_process=ends_process,
    )


def _world_of(group: Any) -> TorchWorld:
    """The ranks of a process group; None is of all.

    Raises:
        QkovError: on a rank outside the group.
    """
    if torch.distributed.get_rank(group) < 0:
        raise QkovError(
            "group",
            expected="a process group that this rank is in",
            got=f"one without rank {torch.distributed.get_rank()}",
            remedy="Make the call on the ranks of the group alone.",
        )
    return TorchWorld.of(group)
