"""How ranks meet in a launcher's store, that of torchrun's agents: under keys that no earlier start of them has left.

torchrun starts ranks again (``--max-restarts``) but keeps its store, in which the addresses of those that died, and
notes of their failure, still are: a rank that reads them waits for the dead. So rank 0 calls a meeting with a number of
its own, each rank comes with a word that it just made up, and is met where rank 0 has read that very word.

    qkov/meeting/number    how many meetings were called
    qkov/meeting/N/RANK    a rank that came to meeting N: its word
    qkov/meeting/N/all     every rank's word, once all have come
    qkov/meeting/N/joined  how many ranks have joined the process group of meeting N
    qkov/meeting/N/failed  there is one that could not: all go to the next meeting
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch

from qkov_dist.errors import QkovError

ROOT = "qkov/meeting"
POLL_S = 0.05  # between two looks at the store
RANKS_A_SECOND = 4000  # that may look at it
LISTED = 8  # ranks in a message
_dist: Any = torch.distributed  # whose stores have no types


def launchers_store(address: str, port: int, seconds: float) -> Any:
    """The store of the launcher, which has it at this port."""
    return _dist.TCPStore(address, port, None, False, datetime.timedelta(seconds=seconds), wait_for_workers=False)


def under(prefix: str, store: Any) -> Any:
    """What is in a store under a prefix, as a store."""
    return _dist.PrefixStore(prefix, store)


def meet(store: Any, rank: int, size: int, end: float) -> Any:
    """Wait until all ranks have come; returns a store of this meeting alone.

    Args:
        store: The launcher's.
        rank: This rank.
        size: How many ranks there are.
        end: When to give up, on ``time.monotonic``'s clock.

    Raises:
        QkovError: names ranks that have not come.
    """
    word, number = uuid.uuid4().hex, 0
    if rank == 0:
        number = store.add(f"{ROOT}/number", 1)
        store.set(_key(number, 0), word)
        keys = [_key(number, one) for one in range(size)]
        if not _until(lambda: store.check(keys), size, end):
            missing = [one for one, key in enumerate(keys) if not store.check([key])]
            raise _not_met(f"none of rank {', '.join(map(str, missing[:LISTED]))}{', ...' * (len(missing) > LISTED)}")
        store.set(_key(number, "all"), json.dumps([store.get(key).decode() for key in keys]))
        return under(f"{ROOT}/{number}", store)

    def is_met() -> bool:
        nonlocal number
        latest = store.add(f"{ROOT}/number", 0)
        if latest > number:
            number = latest
            store.set(_key(number, rank), word)
        everyone = _key(number, "all")
        return bool(number and store.check([everyone]) and json.loads(store.get(everyone))[rank] == word)

    if not _until(is_met, size, end):
        raise _not_met("no word of rank 0")
    return under(f"{ROOT}/{number}", store)


def join(store: Any, rank: int, size: int, end: float, init: Callable[[Any], object]) -> None:
    """Meet, and make the process group; where that fails on a rank, all of them meet again, as long as there is time.

    Args:
        store: The launcher's.
        rank: This rank.
        size: How many ranks there are.
        end: When to give up, on ``time.monotonic``'s clock.
        init: Makes the process group by a meeting's store.

    Raises:
        QkovError: as :func:`meet` does.
        RuntimeError: of a process group that cannot be made.
    """
    while True:
        place = meet(store, rank, size, end)
        try:
            init(place)
        except RuntimeError:
            place.set("failed", "")
            if time.monotonic() >= end:
                raise
        else:
            if _all_joined(place, size, end):
                return
        _forget_group()


def _all_joined(place: Any, size: int, end: float) -> bool:
    """Tell the others that this rank has joined, and wait until all have, or one could not."""
    place.add("joined", 1)
    tried = _until(lambda: bool(place.add("joined", 0) >= size or place.check(["failed"])), size, end)
    return tried and not place.check(["failed"])


def _forget_group() -> None:
    """Be as before the process group was made; a group that could not be made leaves its number."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.distributed.distributed_c10d._world.group_count = 0


def _key(number: int, what: int | str) -> str:
    return f"{ROOT}/{number}/{what}"


def _until(condition: Callable[[], bool], size: int, end: float) -> bool:
    """Wait for a condition; returns whether it came true in time."""
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(max(POLL_S, size / RANKS_A_SECOND))
    return found


def _not_met(got: str) -> QkovError:
    return QkovError(
        "ranks",
        expected="all to meet in the launcher's store",
        got=got,
        remedy="Look at the logs of those that did not come, or set QKOV_TIMEOUT_S to more seconds.",
    )
