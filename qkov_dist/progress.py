"""Progress bars on stderr, for long work on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(what: str, total: int, unit: str, *, show: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar of ``total`` units with the time that is left; yields the function that counts so many more."""
    with tqdm(
        total=total, desc=what, unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=0.5, disable=not show
    ) as bar:
        yield bar.update
