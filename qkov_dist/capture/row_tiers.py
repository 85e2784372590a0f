"""Row buffers, each in the memory that has room for it: on their GPU, in the host's memory, on disk, up to a budget."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.memory import is_shortage

from .row_buffer import RowBuffer, Spilled

Key = tuple[str, Site]  # "x", "d" or "g", and whose it is


class RowTiers:
    """Takes rows batch by batch and gives them back buffer by buffer.

    Args:
        budget_bytes: Rows kept in the host's memory; the rest goes to disk.
        gpu_budget_bytes: Rows that stay on the GPU that they come from, before any go to the host's memory.
        folder: Where the temporary folder for spilled rows is made; the system's own by default.

    Attributes:
        buffers: The rows taken, by what they are.
        bytes_on_gpu: Size of what has its place on a GPU.
        bytes_in_memory: Size of what is held in the host's memory.
        bytes_on_disk: Size of what was spilled.
    """

    def __init__(self, budget_bytes: int, gpu_budget_bytes: int, folder: Path | None) -> None:
        self.budget_bytes, self.gpu_budget_bytes = budget_bytes, gpu_budget_bytes
        self.bytes_on_gpu = self.bytes_in_memory = self.bytes_on_disk = 0
        self.buffers: dict[Key, RowBuffer] = {}
        self._added: list[RowBuffer] = []
        self._copying: set[torch.device] = set()  # GPUs that copy into the host's memory
        self._folder = Path(tempfile.mkdtemp(prefix="qkov-factors-", dir=folder))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def close(self) -> None:
        """Forget everything and remove the temporary folder."""
        self.buffers.clear()
        self._finalizer()

    def begin(self) -> None:
        """Begin a batch."""
        self._added = []

    def has_added(self, key: Key) -> bool:
        """Whether rows of a buffer were taken since the batch began."""
        return any(row_buffer is self.buffers.get(key) for row_buffer in self._added)

    def read(self, key: Key, width: int) -> Tensor:
        """All rows of a buffer; none where there is no such buffer."""
        row_buffer = self.buffers.get(key)
        return torch.empty(0, width) if row_buffer is None else row_buffer.read()

    def append(self, key: Key, rows: Tensor, dtype: torch.dtype, num_expected: int) -> None:
        """Take rows of a buffer.

        Args:
            key: Which buffer.
            rows: The rows, [n, width].
            dtype: In which they are kept.
            num_expected: Rows that the buffer will have in the end, which then have their place in memory from the
                first on; 0 where that is not known.
        """
        rows = rows.detach()
        row_buffer = self.buffers.get(key)
        if row_buffer is None:
            path = self._folder / f"{key[0]}_{len(self.buffers):05d}.bin"
            row_buffer = self.buffers[key] = RowBuffer(path, rows.shape[1], dtype)
            row_buffer.buffer = self._place_for(row_buffer, num_expected, rows.device)
        if row_buffer.buffer is not None:
            row_buffer.keep(rows)
            self._added.append(row_buffer)
            if rows.device.type == "cuda" and row_buffer.buffer.device.type == "cpu":
                self._copying.add(rows.device)
            return
        rows = rows.to("cpu", dtype)
        if self.bytes_in_memory + rows.nbytes <= self.budget_bytes:
            row_buffer.keep(rows)
            self.bytes_in_memory += rows.nbytes
        else:
            self._spill(row_buffer, rows)
        self._added.append(row_buffer)

    def _place_for(self, row_buffer: RowBuffer, num_rows: int, device: torch.device) -> Tensor | None:
        """Memory for all rows of a buffer, where their number is known and it is within a budget."""
        size = num_rows * row_buffer.row_bytes
        if size and device.type != "cpu" and self.bytes_on_gpu + size <= self.gpu_budget_bytes:
            try:
                place = torch.empty(num_rows, row_buffer.width, dtype=row_buffer.dtype, device=device)
            except RuntimeError as error:
                if not is_shortage(error):
                    raise
                self.gpu_budget_bytes = self.bytes_on_gpu
            else:
                self.bytes_on_gpu += size
                return place
        if not size or self.bytes_in_memory + size > self.budget_bytes:
            return None
        pinned = self._pinned(num_rows, row_buffer) if device.type == "cuda" else None
        self.bytes_in_memory += size
        return torch.empty(num_rows, row_buffer.width, dtype=row_buffer.dtype) if pinned is None else pinned

    def _pinned(self, num_rows: int, row_buffer: RowBuffer) -> Tensor | None:
        """Memory that a GPU copies into by itself; none where the system has no more of it."""
        try:
            return torch.empty(num_rows, row_buffer.width, dtype=row_buffer.dtype, pin_memory=True)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            return None

    def finish_copies(self) -> None:
        """Wait for the copies of this batch that GPUs make into the host's memory by themselves."""
        for device in self._copying:
            torch.cuda.synchronize(device)
        self._copying.clear()

    def drop_added(self) -> None:
        """Forget the rows of this batch."""
        for row_buffer in reversed(self._added):
            last = row_buffer.drop_last()
            if isinstance(last, Spilled):
                self.bytes_on_disk -= last.num_rows * row_buffer.row_bytes
            elif row_buffer.buffer is None:
                self.bytes_in_memory -= last.nbytes

    def _spill(self, row_buffer: RowBuffer, rows: Tensor) -> None:
        try:
            row_buffer.spill(rows)
        except OSError as error:
            raise QkovError(
                str(self._folder),
                expected=f"room for {rows.nbytes} bytes of spilled factors",
                got=str(error),
                remedy="Free disk space, set TMPDIR to a larger disk, or raise compute.factor_memory_mb.",
            ) from error
        self.bytes_on_disk += rows.nbytes
