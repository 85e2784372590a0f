"""SIGTERM, as schedulers send it before they kill: the layer in work is finished and recorded, then the run stops.

A rank that is told to stop cannot stop alone, for the others would wait for it. So all ranks ask each other at the same
places whether anyone was told.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .shared_errors import SharedError
from .world import World

EXIT_CODE = 128 + signal.SIGTERM


class StoppedError(SharedError):
    """The run was told to stop, and has recorded what it finished."""

    exit_code = EXIT_CODE


@contextmanager
def stoppable(world: World) -> Iterator[Callable[[], None]]:
    """Take SIGTERM as a request for as long as the block lasts.

    Yields:
        What all ranks call at the places where they may stop.

    Raises:
        StoppedError: on every rank, from such a call, where any of them was told to stop.
    """
    told: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        told.append(number)

    def check() -> None:
        asked = [rank for rank, was_told in enumerate(world.gather(bool(told))) if was_told]
        if asked:
            raise StoppedError(
                f"rank {asked[0]}" if world.size > 1 else "qkov run",
                expected="to finish",
                got="SIGTERM",
                remedy="What is finished is on disk; the same command goes on from there.",
            )

    if threading.current_thread() is not threading.main_thread():
        yield check  # signals are the main thread's: nobody is told here
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield check
        check()  # who was told during the last layer
    except StoppedError:
        world.gather(None)  # nobody leaves, and has a launcher end the others, before all have recorded what they began
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
