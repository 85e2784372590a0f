"""A group of ranks, and what they do together. One process is such a group; the others are in :mod:`qkov_dist.comm`.

Every rank makes the same calls in the same order. What is sent is tensors, or JSON as bytes: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from .errors import QkovError

T = TypeVar("T")


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

    def pass_on(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send the tensors ``sent[r]`` to rank r, and fill ``received[r]`` with what rank r sends here.

        Both ends know how many there are, and of which types and shapes. Those for or from others are contiguous, and
        not copied on their way but by the transport.
        """


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

    def pass_on(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Copy what this rank sends itself."""
        keep_own(sent[0], received[0])


def keep_own(sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """What a rank passes on to itself."""
    for ours, place in zip(sent, received, strict=True):
        place.copy_(ours)


def of_others(tensors: Sequence[Sequence[Tensor]], rank: int) -> list[tuple[int, int, Tensor]]:
    """(other rank, place among that rank's tensors, tensor) of those that are not empty."""
    return [
        (other, tag, tensor)
        for other, of_rank in enumerate(tensors)
        if other != rank
        for tag, tensor in enumerate(of_rank)
        if tensor.numel()
    ]


class SharedError(QkovError):
    """An error that every rank raises, so that none of them waits for another."""


def together(world: World, step: Callable[[], T]) -> T:
    """Take a step on every rank; where it fails on one, raise its error on all of them.

    Raises:
        QkovError: that of the first rank that failed; it names the rank unless all failed alike.
    """
    if world.size == 1:
        return step()
    done: list[T] = []
    refusal = None
    try:
        done.append(step())
    except QkovError as error:
        refusal = error.parts
    refusals = world.gather(refusal)
    for rank, parts in enumerate(refusals):
        if parts:
            place = "" if all(other == parts for other in refusals) else f"rank {rank}: "
            raise SharedError(**{**parts, "where": f"{place}{parts['where']}"})
    return done[0]


def same_on_all(world: World, what: str, value: Mapping[str, Any]) -> None:
    """Raise on every rank unless all were started with the same value; names the first rank and key that differ."""
    everyone = world.gather(value)
    for rank, other in enumerate(everyone):
        for key in sorted({*everyone[0], *other}):
            if everyone[0].get(key) != other.get(key):
                raise SharedError(
                    f"rank {rank}: {what}: {key}",
                    expected=f"what rank 0 has, {everyone[0].get(key)!r}",
                    got=repr(other.get(key)),
                    remedy="Start all ranks with the same command, configuration and files.",
                )
