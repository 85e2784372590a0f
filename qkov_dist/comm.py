"""Ranks: who is here, and how they speak. One process, torch.distributed, or MPI; nothing else knows these.

Every rank makes the same calls in the same order. What is sent is tensors, or JSON as bytes: nothing is pickled. A rank
that fails leaves a note before it goes; the others, whose next call then breaks, find it and name that rank.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import QkovError

TIMEOUT_S = 1800
GRACE_S = 5
NOTE = "qkov/failed"
LAUNCHED_BY_MPI = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
LAUNCHED_BY_SLURM = ("SLURM_PROCID", "SLURM_NTASKS")


class World(Protocol):
    """A group of ranks."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, on every rank."""

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` (bytes, uint8 [n]) to rank r; returns what each rank sent here."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """The value, as JSON would return it."""
        return [json.loads(json.dumps(value))]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The array itself."""
        return values

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The one part."""
        return list(parts)


@dataclass(frozen=True)
class TorchWorld:
    """Ranks of a torch.distributed process group (gloo or nccl).

    Attributes:
        group: The group, or None for all ranks.
        device: Where its tensors have to be.
    """

    group: Any
    device: torch.device

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return int(torch.distributed.get_rank(self.group))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return int(torch.distributed.get_world_size(self.group))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part.cpu().numpy())) for part in self.exchange([text] * self.size)]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, on every rank."""
        total = torch.from_numpy(np.ascontiguousarray(values)).to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        summed: np.ndarray = total.cpu().numpy()
        return summed

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; sizes travel first."""
        sizes = torch.tensor([part.numel() for part in parts], dtype=torch.int64, device=self.device)
        incoming = torch.empty_like(sizes)
        torch.distributed.all_to_all_single(incoming, sizes, group=self.group)
        counts = incoming.tolist()
        sent = torch.cat([part.reshape(-1) for part in parts]).to(self.device)
        received = torch.empty(sum(counts), dtype=torch.uint8, device=self.device)
        torch.distributed.all_to_all_single(received, sent, counts, sizes.tolist(), group=self.group)
        return list(torch.split(received.cpu(), counts))

    def subgroup(self, members: Sequence[Sequence[int]]) -> TorchWorld:
        """The group among ``members`` (lists of ranks) that this rank is in; every rank names all of them."""
        mine = None
        for ranks in members:
            group = torch.distributed.new_group(list(ranks), timeout=datetime.timedelta(seconds=_timeout()))
            if self.rank in ranks:
                mine = group
        return TorchWorld(mine, self.device)


@dataclass(frozen=True)
class MpiWorld:
    """Ranks of an MPI communicator (mpi4py), for merging without a process group."""

    comm: Any

    @property
    def rank(self) -> int:
        """This rank's place."""
        return int(self.comm.Get_rank())

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return int(self.comm.Get_size())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part.numpy())) for part in self.exchange([text] * self.size)]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, on every rank."""
        total = np.empty_like(np.ascontiguousarray(values))
        self.comm.Allreduce(np.ascontiguousarray(values), total)
        return total

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; sizes travel first."""
        sizes = np.array([part.numel() for part in parts], np.int64)
        counts = np.empty_like(sizes)
        self.comm.Alltoall(sizes, counts)
        received = np.empty(int(counts.sum()), np.uint8)
        sent = torch.cat([part.reshape(-1) for part in parts]).numpy()
        self.comm.Alltoallv([sent, (sizes, _offsets(sizes))], [received, (counts, _offsets(counts))])
        return list(torch.split(torch.from_numpy(received), counts.tolist()))


def launched_size() -> int:
    """How many ranks the launcher started, before they are connected."""
    names = ("WORLD_SIZE", *(size for _, size in LAUNCHED_BY_MPI), LAUNCHED_BY_SLURM[1])
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


@contextmanager
def connected() -> Iterator[World]:
    """Connect the ranks that the launcher started; one process where it started one.

    ``torchrun``, ``accelerate launch`` and ``deepspeed`` say who is who in the environment; for ``mpirun`` and ``srun``
    it is worked out here. A process group that is there already is used and left alone.

    Raises:
        QkovError: where a rank fails: on that rank its own error, on the others one that names it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with _failures_named(_default_world()):
            yield _default_world()
        return
    if launched_size() == 1:
        yield Alone()
        return
    _complete_environment()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=_timeout()))
    try:
        with _failures_named(_default_world()):
            yield _default_world()
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def current() -> World:
    """The ranks that are connected now; one process where none are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _default_world()
    return Alone()


@contextmanager
def connected_by_mpi() -> Iterator[World]:
    """The ranks of ``mpirun``, without a process group; one process where there are none or mpi4py is missing.

    Raises:
        QkovError: under ``mpirun`` without mpi4py.
    """
    started = next((int(os.environ[size]) for _, size in LAUNCHED_BY_MPI if size in os.environ), 1)
    if started == 1:
        yield Alone()
        return
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise QkovError(
            "mpirun",
            expected="mpi4py, to merge over MPI",
            got=str(error),
            remedy="Run `pip install 'qkov-dist[mpi]'`, or merge in one process without mpirun.",
        ) from error
    yield MpiWorld(MPI.COMM_WORLD)


def same_on_all(world: World, what: str, value: Mapping[str, Any]) -> None:
    """Raise on every rank unless all were started with the same value; names the first rank and key that differ."""
    everyone = world.gather(value)
    for rank, other in enumerate(everyone):
        for key in sorted({*everyone[0], *other}):
            if everyone[0].get(key) != other.get(key):
                raise QkovError(
                    f"rank {rank}: {what}: {key}",
                    expected=f"what rank 0 has, {everyone[0].get(key)!r}",
                    got=repr(other.get(key)),
                    remedy="Start all ranks with the same command, configuration and files.",
                )


@contextmanager
def _failures_named(world: World) -> Iterator[None]:
    """Leave a note when this rank fails; when another did, raise an error that names it."""
    store = torch.distributed.distributed_c10d._get_default_store()
    try:
        yield
    except (torch.distributed.DistError, RuntimeError) as error:
        if note := _note_of_another(store, world.rank):
            raise QkovError(
                f"rank {note['rank']}",
                expected="to finish",
                got=note["message"],
                remedy="See that rank's own message; the layers on disk are kept.",
            ) from error
        _leave_note(store, world.rank, error)
        if not _is_lost_connection(error):
            raise
        raise QkovError(
            _missing_ranks(store, world),
            expected="an answer",
            got=f"none (seen by rank {world.rank}: {str(error).splitlines()[0]})",
            remedy="It died or hangs: look at its log and for lack of memory. The layers on disk are kept.",
        ) from error
    except BaseException as error:
        _leave_note(store, world.rank, error)
        raise


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket")
    return isinstance(error, torch.distributed.DistError) or any(sign in text for sign in signs)


def _leave_note(store: Any, rank: int, error: BaseException) -> None:
    note = json.dumps({"rank": rank, "message": f"{type(error).__name__}: {error}"[:2000]})
    try:
        store.set(f"{NOTE}/{rank}", note)
        store.compare_set(NOTE, "", note)
    except (RuntimeError, torch.distributed.DistError):
        return  # the rank that holds the store is gone; there is nobody left to tell


def _note_of_another(store: Any, rank: int) -> dict[str, Any] | None:
    try:
        store.wait([NOTE], datetime.timedelta(seconds=GRACE_S))
        note: dict[str, Any] = json.loads(store.get(NOTE))
    except (RuntimeError, ValueError, torch.distributed.DistError):
        return None
    return note if note["rank"] != rank else None


def _missing_ranks(store: Any, world: World) -> str:
    """The ranks that left no note within the grace: those that died."""
    missing = []
    for rank in range(world.size):
        try:
            store.wait([f"{NOTE}/{rank}"], datetime.timedelta(seconds=1))
        except (RuntimeError, torch.distributed.DistError):
            missing.append(str(rank))
    return f"rank {', '.join(missing)}" if missing else "a rank"


def _default_world() -> TorchWorld:
    on_gpu = torch.distributed.get_backend() == "nccl"
    return TorchWorld(None, torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))


def _complete_environment() -> None:
    """Under ``mpirun`` and ``srun``, set what torchrun would: who this rank is, and where rank 0 listens."""
    if "RANK" in os.environ:
        return
    for rank_name, size_name in (*LAUNCHED_BY_MPI, LAUNCHED_BY_SLURM):
        if rank_name in os.environ:
            os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[rank_name], os.environ[size_name]
            break
    local = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    os.environ.setdefault("LOCAL_RANK", next((os.environ[name] for name in local if name in os.environ), "0"))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(29500 + int(os.environ.get("SLURM_JOB_ID", "0")) % 1000))


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _timeout() -> int:
    return int(os.environ.get("QKOV_TIMEOUT_S", TIMEOUT_S))
