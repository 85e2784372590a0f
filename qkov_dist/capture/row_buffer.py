"""The rows of one captured factor, in memory or on disk; what comes back is identical, bit for bit.

Where the number of rows is known before, they have one buffer from the first on, on a GPU or in the host's memory, and
reading copies nothing. Rows past the budget are appended, as raw bytes, to a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qkov_dist.errors import QkovError


@dataclass(frozen=True)
class Spilled:
    """A block of rows in a buffer's file."""

    offset: int
    num_rows: int


@dataclass
class RowBuffer:
    """The rows of one factor, batch after batch: in one buffer where its size was known before, else in blocks."""

    path: Path
    width: int
    dtype: torch.dtype
    buffer: Tensor | None = None
    blocks: list[Tensor | Spilled] = field(default_factory=list)
    num_rows: int = 0

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self.width * self.dtype.itemsize

    def keep(self, rows: Tensor) -> None:
        """Take rows into memory; a GPU copies into pinned memory by itself, and has to be waited for."""
        if self.buffer is not None:
            place = self.buffer[self.num_rows : self.num_rows + rows.shape[0]]
            rows = place.copy_(rows, non_blocking=True)
        self.blocks.append(rows)
        self.num_rows += rows.shape[0]

    def spill(self, rows: Tensor) -> None:
        """Take rows onto the disk."""
        with self.path.open("ab") as file:
            offset = file.tell()
            rows.contiguous().view(torch.uint8).numpy().tofile(file)
        self.blocks.append(Spilled(offset, rows.shape[0]))
        self.num_rows += rows.shape[0]

    def read(self) -> Tensor:
        """All rows; those in a buffer are a view of it."""
        if self.buffer is not None:
            return self.buffer[: self.num_rows]
        if len(self.blocks) == 1 and isinstance(self.blocks[0], Tensor):
            return self.blocks[0]
        values = torch.empty(self.num_rows, self.width, dtype=self.dtype)
        start = 0
        for block in self.blocks:
            num_rows = block.num_rows if isinstance(block, Spilled) else block.shape[0]
            place = values[start : start + num_rows]
            if isinstance(block, Spilled):
                self._read(block, place)
            else:
                place.copy_(block)
            start += num_rows
        return values

    def drop_last(self) -> Tensor | Spilled:
        """Forget the last block, and return what it was."""
        last = self.blocks.pop()
        self.num_rows -= last.num_rows if isinstance(last, Spilled) else last.shape[0]
        if isinstance(last, Spilled):
            with self.path.open("r+b") as file:
                file.truncate(last.offset)
        return last

    def _read(self, block: Spilled, place: Tensor) -> None:
        """Fill ``place`` with a spilled block."""
        num_bytes = block.num_rows * self.row_bytes
        with self.path.open("rb") as file:
            file.seek(block.offset)
            got = file.readinto(place.view(torch.uint8).numpy().data)
        if got != num_bytes:
            raise QkovError(
                str(self.path),
                expected=f"{num_bytes} bytes of spilled factors",
                got=f"{got}",
                remedy="The temporary folder was changed during the run; start again.",
            )
