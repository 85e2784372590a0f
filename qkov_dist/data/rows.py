"""A row of a task: its place, its number and what it holds; and how many are read before it is too much.

Readers give rows unread: what a row holds is looked at only where it is taken, so that drawing a few of many rows
parses few. A row's number, from 1, is that of its line (JSONL) or of its row (tables), counted on from file to file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from qkov_dist.errors import QkovError
from qkov_dist.values import readable

MAX_ROWS, MAX_BYTES = 100_000, 64 << 20  # read before ``max_samples`` stops it; unpacked, where packed

Content = dict[str, Any]
Row = tuple[str, int, Content]  # place, number from 1, content


class Unread(NamedTuple):
    """A row before it is looked at: ``read`` gives what it holds, or raises QkovError at its place."""

    place: str
    number: int
    read: Callable[[], Content]

    def row(self) -> Row:
        """The row itself."""
        return self.place, self.number, self.read()


@dataclass
class Budget:
    """How much of a source may be read, rows that are passed over included; without a limit where all is asked for."""

    limited: bool = True
    rows: int = 0
    num_bytes: int = 0

    def spend(self, num_bytes: int, path: Path | str, number: int, *, rows: int = 1) -> None:
        """Count what was read up to line or row ``number`` of a path; raises QkovError where it is too much."""
        self.rows, self.num_bytes = self.rows + rows, self.num_bytes + num_bytes
        if self.limited and (self.rows > MAX_ROWS or self.num_bytes > MAX_BYTES):
            expected = f"at most {MAX_ROWS} lines or rows and {MAX_BYTES >> 20} MiB"
            remedy = "Set max_samples of this task to read the first samples alone, or shorten the file."
            raise QkovError(f"{path}:{number}", expected=expected, got="more", remedy=remedy)


def drawn(rows: Iterable[Unread], count: int, seed: int) -> list[Row]:
    """``count`` of the rows, or all where there are fewer, drawn with equal chances and kept in their order.

    Which ones follows from the seed and the number of rows alone (reservoir sampling: one pass, ``count`` rows in
    memory, whatever the number of rows).
    """
    draw = Random(seed)
    kept: dict[int, tuple[int, Row]] = {}  # slot -> where in the order, and the row
    for index, unread in enumerate(rows):
        slot = index if index < count else int(draw.random() * (index + 1))
        if slot < count:
            kept[slot] = index, unread.row()
    return [row for _, row in sorted(kept.values(), key=lambda entry: entry[0])]


def unreadable(place: str, kind: str, error: Exception) -> QkovError:
    """The error for a file that cannot be opened, or is broken somewhere."""
    got = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".") or type(error).__name__
    remedy = f"Check the path and the file's contents; it is taken from {Path.cwd()}."
    return QkovError(place, expected=kind, got=readable(got), remedy=remedy)
