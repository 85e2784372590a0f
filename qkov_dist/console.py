"""Progress bars on stderr, for long work on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm


@contextmanager
def progress_bar(what: str, total: int, unit: str, *, show: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar of ``total`` units with the time that is left; yields the function that counts so many more."""
    with tqdm(
        total=total, desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=0.5, disable=not show
    ) as bar:
        yield bar.update


@dataclass(frozen=True)
class Voice:
    """How a run speaks to its user.

    Attributes:
        say: Takes a line about a stage; silent but on rank 0.
        warn: Takes a line about something that concerns this rank.
        show_progress: Whether to show progress bars.
    """

    say: Callable[[str], object]
    warn: Callable[[str], object]
    show_progress: bool

    @staticmethod
    def of_rank(rank: int, size: int, say: Callable[[str], object], *, show_progress: bool) -> Voice:
        """That of one of several ranks, or of a process alone."""
        if size == 1:
            return Voice(say, say, show_progress)
        is_first = rank == 0
        return Voice(
            say if is_first else lambda line: None, lambda line: say(f"rank {rank}: {line}"), is_first and show_progress
        )
