"""A group of ranks, and what they do together: one process, a group of torch.distributed, a communicator of MPI.

Every rank makes the same calls in the same order. What is sent is tensors, or JSON as bytes: nothing is pickled.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qkov_dist.errors import QkovError
from qkov_dist.memory import moved


class World(Protocol):
    """A group of ranks."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def names(self) -> Sequence[int]:
        """What its ranks are called in messages: their ranks among all that the launcher started."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, on every rank."""

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` (bytes, uint8 [n]) to rank r; returns what each rank sent here."""

    def carries(self, device_type: str) -> bool:
        """Whether tensors in the memory of such a device go from rank to rank without passing the host's."""

    def over(self, device: torch.device) -> World:
        """The same group, over whose tensors' memory on that device all goes; all ranks call for the same kind."""

    def send_recv(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send the tensors ``sent[r]`` to rank r, and fill ``received[r]`` with what rank r sends here.

        Both ends know how many there are, and of which types and shapes. Those for or from others are contiguous, and
        not copied on their way but by the transport.
        """


class Alone:
    """One process."""

    rank, size = 0, 1

    @property
    def names(self) -> Sequence[int]:
        """As many as there are ranks."""
        return range(self.size)

    def all_gather(self, value: Any) -> list[Any]:
        """The value, as JSON would return it."""
        return [json.loads(json.dumps(value))]

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """The array itself."""
        return values

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The one part."""
        return list(parts)

    def carries(self, device_type: str) -> bool:
        """Nothing goes anywhere."""
        return True

    def over(self, device: torch.device) -> World:
        """The same process."""
        return self

    def send_recv(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Copy what this rank sends itself."""
        keep_own(sent[0], received[0])


def keep_own(sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """What a rank passes on to itself."""
    for ours, place in zip(sent, received, strict=True):
        place.copy_(ours, non_blocking=place.is_cuda)


def of_others(tensors: Sequence[Sequence[Tensor]], rank: int) -> list[tuple[int, int, Tensor]]:
    """(other rank, place among that rank's tensors, tensor) of those that are not empty."""
    return [
        (other, tag, tensor)
        for other, of_rank in enumerate(tensors)
        if other != rank
        for tag, tensor in enumerate(of_rank)
        if tensor.numel()
    ]


TIMEOUT_S = 1800


def back_ends(described: str) -> dict[str, str]:
    """The back end of each type of device, as torch describes a group: ``cpu:gloo,cuda:nccl``."""
    return dict(of_device.split(":") for of_device in described.split(","))


@dataclass(frozen=True)
class TorchWorld:
    """Ranks of a torch.distributed process group, with a back end for each type of device that it serves.

    Attributes:
        group: The group, or None for all ranks.
        device: Where its tensors have to be.
    """

    group: Any
    device: torch.device

    @staticmethod
    def of(group: Any = None) -> TorchWorld:
        """A group, over the host's memory where it has a back end for that, else over that of the current GPU."""
        on_cpu = "cpu" in back_ends(torch.distributed.get_backend_config(group))
        return TorchWorld(group, torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()))

    def carries(self, device_type: str) -> bool:
        """Whether it has a back end for such a device; gloo's for GPUs goes over the host, and sends nothing."""
        of_device = back_ends(torch.distributed.get_backend_config(self.group)).get(device_type)
        return of_device is not None and (device_type == "cpu" or of_device != "gloo")

    def over(self, device: torch.device) -> World:
        """The same group, with tensors on another device that it carries."""
        return replace(self, device=device)

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        return int(torch.distributed.get_rank(self.group))

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return int(torch.distributed.get_world_size(self.group))

    @property
    def names(self) -> Sequence[int]:
        """The ranks of the group among all."""
        return range(self.size) if self.group is None else torch.distributed.get_process_group_ranks(self.group)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""
        return _gathered(self, value)

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, on every rank."""
        total = torch.from_numpy(np.array(values, order="C")).to(self.device)
        torch.distributed.all_reduce(total, group=self.group)
        summed: np.ndarray = total.cpu().numpy()
        return summed

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; sizes travel first."""
        sizes = torch.tensor([part.numel() for part in parts], dtype=torch.int64, device=self.device)
        incoming = torch.empty_like(sizes)
        torch.distributed.all_to_all_single(incoming, sizes, group=self.group)
        counts = incoming.tolist()
        sent = torch.cat([part.reshape(-1) for part in parts]).to(self.device)
        received = torch.empty(sum(counts), dtype=torch.uint8, device=self.device)
        torch.distributed.all_to_all_single(received, sent, counts, sizes.tolist(), group=self.group)
        return list(torch.split(received.cpu(), counts))

    def send_recv(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send tensors where they lie, into where they will lie, or by way of the group's device."""
        places, step = of_others(received, self.rank), torch.distributed.P2POp
        is_there = [place.device.type == self.device.type for *_, place in places]
        staged = [
            place if there else torch.empty_like(place, device=self.device)
            for (*_, place), there in zip(places, is_there, strict=True)
        ]
        steps = [
            step(torch.distributed.irecv, there, None, self.group, tag, group_peer=rank)
            for (rank, tag, _), there in zip(places, staged, strict=True)
        ]
        steps += [
            step(torch.distributed.isend, moved(ours, self.device), None, self.group, tag, group_peer=rank)
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
        mine, timeout = None, datetime.timedelta(seconds=timeout_seconds())
        for ranks in members:
            if self.group is not None and self.rank not in ranks:
                continue  # ranks beyond this world take no part: those of a group make it by themselves
            named = [self.names[rank] for rank in ranks]
            local = self.group is not None
            group = torch.distributed.new_group(named, timeout=timeout, use_local_synchronization=local)
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

    @property
    def names(self) -> Sequence[int]:
        """As many as there are ranks."""
        return range(self.size)

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""
        return _gathered(self, value)

    def all_reduce(self, values: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks, on every rank."""
        mine = np.array(values, order="C")
        total = np.empty_like(mine)
        self.comm.Allreduce(mine, total)
        return total

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; sizes travel first."""
        sizes = np.array([part.numel() for part in parts], np.int64)
        counts = np.empty_like(sizes)
        self.comm.Alltoall(sizes, counts)
        received = np.empty(int(counts.sum()), np.uint8)
        sent = torch.cat([part.reshape(-1) for part in parts]).numpy()
        self.comm.Alltoallv([sent, (sizes, _offsets(sizes))], [received, (counts, _offsets(counts))])
        return list(torch.split(torch.from_numpy(received), counts.tolist()))

    def carries(self, device_type: str) -> bool:
        """Only what is in the host's memory: MPI is not asked whether it knows GPUs."""
        return device_type == "cpu"

    def over(self, device: torch.device) -> World:
        """The same communicator."""
        return self

    def send_recv(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send tensors in the host's memory as the bytes they are, into where they will lie."""
        keep_own(sent[self.rank], received[self.rank])
        waiting = [self.comm.Irecv(_as_bytes(place), rank, tag) for rank, tag, place in of_others(received, self.rank)]
        waiting += [self.comm.Isend(_as_bytes(ours), rank, tag) for rank, tag, ours in of_others(sent, self.rank)]
        for request in waiting:
            request.Wait()


def _gathered(world: World, value: Any) -> list[Any]:
    """Every rank's JSON value, by rank, sent as bytes."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.numpy())) for part in world.all_to_all([text] * world.size)]


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
