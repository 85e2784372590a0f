"""One attempt of a run: its ranks as real processes that run the command, and die when and as they are told.

Processes are forked from one that has imported everything and has no thread but the first, so that an attempt takes
about a second. Each runs ``qkov run`` as from the command line, writes what it says into a file, and takes notes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from forks import assert_alone, write_to
from moments import Aim, Seen, read_notes, take_notes
from processes import wait_shortly
from ranks import free_port

TIMEOUT_S = 20  # QKOV_TIMEOUT_S: how long ranks wait for each other
DEADLINE_S = 150  # of a whole attempt, and again of those who survive; only a hang takes as long


@dataclass(frozen=True)
class Order:
    """What an attempt runs: the configuration's overrides, on how many ranks, and where notes and words go.

    ``shard`` is how the model is cut, one of ``scene.CUTS``, and ``settings`` says so to the command.
    ``broken`` is called in each rank before the command: a test breaks the product with it.
    """

    config: Path
    overrides: tuple[str, ...]
    shard: str
    settings: tuple[str, ...]
    num_ranks: int
    notes: Path
    broken: Callable[[], None] | None = None


@dataclass(frozen=True)
class Clock:
    """A moment seen from outside: so many seconds after the start."""

    seconds: float
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Kill:
    """When which ranks get a signal. The first of them is the one whose steps an aim counts."""

    moment: Clock | Aim
    victims: tuple[int, ...]

    @property
    def signal(self) -> int:
        return self.moment.signal


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, by rank.

    Attributes:
        codes: Exit codes; minus the signal's number where one killed the rank.
        said: What each wrote.
        seen: Its notes.
        struck: Ranks that got the signal, from outside or from themselves.
        phase: Where they were then; empty where nobody got it.
        hung: Ranks that had to be ended because they did not end by themselves.
        seconds: How long it took.
    """

    codes: tuple[int, ...]
    said: tuple[str, ...]
    seen: tuple[Seen, ...]
    struck: frozenset[int]
    phase: str
    hung: frozenset[int]
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether every rank got to the end."""
        return not any(self.codes)


def play(context: Any, order: Order, kill: Kill | None) -> Outcome:
    """Start the ranks, strike as told, and wait for the end."""
    order.notes.mkdir(parents=True)
    start, ranks = time.monotonic(), range(order.num_ranks)
    processes = [context.Process(target=_rank, args=call) for call in _calls(order, kill)]
    for process in processes:
        process.start()
    phase = _strike(processes, order, kill, start) if kill else ""
    hung = _ended(processes, DEADLINE_S)
    seconds = time.monotonic() - start
    seen = tuple(read_notes(_notes(order, rank)) for rank in ranks)
    struck = _struck(kill, processes, seen, phase)
    said = tuple(path.read_text(errors="replace") if path.exists() else "" for path in map(_said(order), ranks))
    return Outcome(tuple(process.exitcode for process in processes), said, seen, struck, phase, hung, seconds)


def _strike(processes: Sequence[Any], order: Order, kill: Kill, start: float) -> str:
    """Send the signal when the time has come, or, to all other victims, when one was killed by its own.

    Returns:
        The phase in which the victims were struck; empty where they ended before.
    """
    moment, left = kill.moment, list(kill.victims)
    if isinstance(moment, Clock):
        wait([processes[rank].sentinel for rank in left], max(0.0, start + moment.seconds - time.monotonic()))
        alive = [rank for rank in left if processes[rank].exitcode is None]
        phase = read_notes(_notes(order, alive[0])).phase if alive else ""
        for rank in alive:
            _send(processes[rank], kill.signal)
        return phase
    while left and wait([processes[rank].sentinel for rank in left], DEADLINE_S):
        if any(processes[rank].exitcode == -kill.signal for rank in left):
            for rank in left:
                _send(processes[rank], kill.signal)
            break
        left = [rank for rank in left if processes[rank].exitcode is None]
    return moment.phase if any(read_notes(_notes(order, rank)).told is not None for rank in kill.victims) else ""


def _struck(kill: Kill | None, processes: Sequence[Any], seen: Sequence[Seen], phase: str) -> frozenset[int]:
    """The victims that got the signal."""
    if kill is None or not phase:
        return frozenset()
    if isinstance(kill.moment, Clock):
        return frozenset(kill.victims)
    return frozenset(
        rank for rank in kill.victims if seen[rank].told is not None or processes[rank].exitcode == -kill.signal
    )


def _send(process: Any, number: int) -> None:
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended just now, which the server has yet to say
            os.kill(process.pid, number)


def _ended(processes: Sequence[Any], seconds: float) -> frozenset[int]:
    """Wait for all; returns the ranks that had to be killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in late:
        processes[rank].kill()
        processes[rank].join()
    return frozenset(late)


def _calls(order: Order, kill: Kill | None) -> list[tuple[Any, ...]]:
    """Each rank's arguments."""
    overrides = [*order.overrides, *order.settings]
    arguments = ["run", str(order.config), "--quiet", *overrides]
    aim = kill.moment if kill and isinstance(kill.moment, Aim) else None
    port, calls = free_port(), []
    for rank in range(order.num_ranks):
        environment = _environment(rank, order.num_ranks, port) if order.num_ranks > 1 else {}
        mine = aim if kill and rank in kill.victims else None
        calls.append((order, rank, arguments, environment, mine))
    return calls


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: str(value) for name, value in names.items()} | address


def _rank(order: Order, rank: int, arguments: Sequence[str], environment: Mapping[str, str], aim: Aim | None) -> None:
    """A rank's process: the command, and its exit code."""
    write_to(_said(order)(rank), _said(order)(rank))
    assert_alone()
    os.environ.update(environment, QKOV_TIMEOUT_S=str(TIMEOUT_S), OMP_NUM_THREADS="1")
    from qkov_dist.cli import main

    wait_shortly()
    if order.broken:
        order.broken()
    take_notes(_notes(order, rank), aim)
    sys.exit(main(arguments))


def _said(order: Order) -> Any:
    return lambda rank: order.notes / f"said{rank}.txt"


def _notes(order: Order, rank: int) -> Path:
    return order.notes / f"notes{rank}.txt"
