"""How ranks speak: torch.distributed (gloo or nccl) or MPI; nothing else knows these.

Who started the ranks is :mod:`qkov_dist.launcher`; how one rank's failure reaches the others,
:mod:`qkov_dist.failures`.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import QkovError
from .failures import Watch
from .launcher import check_interface, launched_size, rendezvous
from .notes import ROOT
from .world import Alone, SharedError, World, keep_own, of_others, same_on_all, together

__all__ = [
    "Alone",
    "MpiWorld",
    "SharedError",
    "TorchWorld",
    "World",
    "connected",
    "connected_by_mpi",
    "current",
    "same_on_all",
    "step",
    "timeout_seconds",
    "together",
]

TIMEOUT_S = 1800


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
        total = torch.from_numpy(np.array(values, order="C")).to(self.device)
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

    def pass_on(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send tensors where they lie, into where they will lie; over a GPU's memory where the group is of GPUs."""
        places, step = of_others(received, self.rank), torch.distributed.P2POp
        on_cpu = self.device.type == "cpu"
        staged = [place if on_cpu else torch.empty_like(place, device=self.device) for *_, place in places]
        steps = [
            step(torch.distributed.irecv, there, None, self.group, tag, group_peer=rank)
            for (rank, tag, _), there in zip(places, staged, strict=True)
        ]
        steps += [
            step(torch.distributed.isend, ours.to(self.device), None, self.group, tag, group_peer=rank)
            for rank, tag, ours in of_others(sent, self.rank)
        ]
        under_way = torch.distributed.batch_isend_irecv(steps) if steps else []
        keep_own(sent[self.rank], received[self.rank])
        for work in under_way:
            work.wait()
        for (_, _, place), there in zip(places, staged, strict=True):
            if there is not place:
                place.copy_(there)

    def subgroup(self, members: Sequence[Sequence[int]]) -> TorchWorld:
        """The group among ``members`` (lists of ranks) that this rank is in; every rank names all of them."""
        mine = None
        for ranks in members:
            group = torch.distributed.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout_seconds()))
            if self.rank in ranks:
                mine = group
        if mine is None:
            raise ValueError(f"rank {self.rank} is in none of the groups {members}")
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
        mine = np.array(values, order="C")
        total = np.empty_like(mine)
        self.comm.Allreduce(mine, total)
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

    def pass_on(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send tensors as the bytes they are, into where they will lie."""
        keep_own(sent[self.rank], received[self.rank])
        waiting = [self.comm.Irecv(_as_bytes(place), rank, tag) for rank, tag, place in of_others(received, self.rank)]
        waiting += [self.comm.Isend(_as_bytes(ours), rank, tag) for rank, tag, ours in of_others(sent, self.rank)]
        for request in waiting:
            request.Wait()


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


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's memory, uint8 [n]."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])


def timeout_seconds() -> int:
    """Seconds that a rank waits for the others."""
    text = os.environ.get("QKOV_TIMEOUT_S", str(TIMEOUT_S))
    if not text.isdecimal() or int(text) < 1:
        raise QkovError(
            "QKOV_TIMEOUT_S",
            expected="a whole number of seconds, at least 1",
            got=repr(text),
            remedy=f"Set it so, or leave it out for {TIMEOUT_S}.",
        )
    return int(text)
