"""Lines and progress bars for a user who waits, on rank 0 alone; bars go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

Say = Callable[[str], object]


def _nothing(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Console:
    """How long work speaks to its user; silent by default.

    Attributes:
        say: Takes a line about a stage; silent but on rank 0.
        warn: Takes a line about something that concerns this rank.
        show_progress: Whether to show progress bars.
    """

    say: Say = _nothing
    warn: Say = _nothing
    show_progress: bool = False

    @staticmethod
    def of(say: Say, *, show_progress: bool) -> Console:
        """That of a process alone."""
        return Console(say, say, show_progress)

    def on_rank(self, rank: int, size: int) -> Console:
        """That of one of several ranks, where this one is that of a process alone."""
        if size == 1:
            return self
        say = self.say if rank == 0 else _nothing
        return Console(say, lambda line: self.say(f"rank {rank}: {line}"), self.show_progress and rank == 0)

    @contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Show a bar of ``total`` units with the time that is left; yields the function that counts so many more."""
        with tqdm(
            total=total,
            desc=what,
            unit=unit,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self.show_progress,
        ) as bar:
            yield bar.update


SILENT = Console()
