"""Ranks meet in a store that others used before them."""

from __future__ import annotations

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import TCPStore

from qkov_dist.distributed import meeting
from qkov_dist.distributed.meeting import ROOT, join, meet
from qkov_dist.errors import QkovError

SECONDS = 30.0


@pytest.fixture
def store():
    """A launcher's store: a new client of it on each call."""
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    timeout = datetime.timedelta(seconds=SECONDS)
    return lambda: TCPStore("127.0.0.1", server.port, None, False, timeout, wait_for_workers=False)


def on_ranks(size: int, call) -> list:
    """What each of so many ranks returns, all at once; later ones come first."""
    with ThreadPoolExecutor(size) as threads:
        running = [threads.submit(call, rank) for rank in reversed(range(size))]
        return [one.result(2 * SECONDS) for one in reversed(running)]


def test_ranks_of_a_later_start_read_nothing_of_an_earlier_one(store):
    """All that dead ranks left is there still: their numbers, words and addresses."""
    for start in range(3):

        def start_one(rank: int, start: int = start) -> tuple[str, bool]:
            place = meet(store(), rank, 3, time.monotonic() + SECONDS)
            is_new = not place.check([f"address{rank}"])
            place.set(f"address{rank}", str(start))
            return place.get(f"address{rank}").decode(), is_new

        assert on_ranks(3, start_one) == [(str(start), True)] * 3


def test_the_word_of_a_dead_rank_is_not_taken_for_that_of_its_successor(store):
    """Rank 1 died after it had come to the meeting, in which rank 0 read its word."""
    place = store()
    place.add(f"{ROOT}/number", 1)
    place.set(f"{ROOT}/1/all", '["the first\'s", "the dead one\'s"]')
    with pytest.raises(QkovError, match="ranks: expected all to meet in the launcher's store, got no word of rank 0"):
        meet(store(), 1, 2, time.monotonic() + 0.3)
    met = on_ranks(2, lambda rank: meet(store(), rank, 2, time.monotonic() + SECONDS))
    met[0].set("here", "")
    assert met[1].check(["here"])
    assert place.add(f"{ROOT}/number", 0) == 2


def test_ranks_that_do_not_come_are_named(store):
    with pytest.raises(QkovError, match=r"got none of rank 1, 2, 3, 4, 5, 6, 7, 8, \.\.\.\. Look at the logs"):
        meet(store(), 0, 12, time.monotonic() + 0.2)


def test_where_one_cannot_join_all_meet_again(store, monkeypatch):
    monkeypatch.setattr(meeting, "_forget_group", lambda: None)  # of this process, which is all ranks
    tries = [0, 0, 0]

    def call(rank: int) -> int:
        def init(place) -> None:
            tries[rank] += 1
            if rank == 1 and tries[rank] < 3:
                raise RuntimeError("connection reset by peer")

        join(store(), rank, 3, time.monotonic() + SECONDS, init)
        return tries[rank]

    assert on_ranks(3, call) == [3] * 3


def test_where_none_ever_joins_the_last_error_is_told(store, monkeypatch):
    monkeypatch.setattr(meeting, "_forget_group", lambda: None)

    def call(rank: int) -> str:
        def init(place) -> None:
            raise RuntimeError("no route to host")

        try:
            join(store(), rank, 2, time.monotonic() + 0.5, init)
        except (RuntimeError, QkovError) as error:
            return str(error)
        return "joined"

    assert all("no route to host" in said or "to meet" in said for said in on_ranks(2, call))


def test_a_group_that_could_not_be_made_leaves_no_number():
    """Ranks that tried more often than others would call their groups by other names, and never find each other."""
    world = torch.distributed.distributed_c10d._world
    before, world.group_count = world.group_count, 7
    try:
        meeting._forget_group()
        assert world.group_count == 0
    finally:
        world.group_count = before
