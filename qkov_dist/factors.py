"""Where captured factors wait until their layer is scored: in memory up to a budget, on disk beyond it.

Each site has one series of rows for X (kept once for the projections that share it) and one for D: the real tokens of
every batch, one after another. All series have the same rows, so one table of spans says where a sample lies in each.
Blocks past the budget are appended, as raw bytes, to one file per series in a private temporary folder. What comes
back is identical, bit for bit.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import Batch
from .capture import Factors, Site
from .errors import QkovError
from .geometry import Rect

SPILLED = "qkov-factors-"  # how temporary folders of spilled factors begin
Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Rows of a factor at the features [start, start + width) of its projection."""

    values: Tensor
    start: int = 0

    def features(self, part: slice) -> Tensor:
        """The columns of some features, by their number in the whole projection.

        Raises:
            QkovError: for features outside the window.
        """
        low, high = part.start - self.start, part.stop - self.start
        if low < 0 or high > self.values.shape[1]:
            raise QkovError(
                "captured factors",
                expected=f"features {part.start} to {part.stop}",
                got=f"{self.start} to {self.start + self.values.shape[1]}",
                remedy="Report this: the plan asks a rank for what its hooks do not see.",
            )
        return self.values[:, low:high]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Window:
        """The same window elsewhere, in another type."""
        return Window(self.values.to(device, dtype), self.start)


@dataclass(frozen=True)
class _Spilled:
    """A block of rows in a series' file."""

    offset: int
    num_rows: int


@dataclass
class _Series:
    """The rows of one factor, batch after batch."""

    path: Path
    width: int
    dtype: torch.dtype
    blocks: list[Tensor | _Spilled] = field(default_factory=list)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def spill(self, rows: Tensor) -> None:
        with self.path.open("ab") as file:
            offset = file.tell()
            rows.contiguous().view(torch.uint8).numpy().tofile(file)
        self.blocks.append(_Spilled(offset, rows.shape[0]))

    def read(self) -> Tensor:
        parts = [self._read(b) if isinstance(b, _Spilled) else b for b in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def drop_last(self) -> Tensor | _Spilled:
        """Forget the last block, and return what it was."""
        last = self.blocks.pop()
        if isinstance(last, _Spilled):
            with self.path.open("r+b") as file:
                file.truncate(last.offset)
        return last

    def _read(self, block: _Spilled) -> Tensor:
        num_bytes = block.num_rows * self.row_bytes
        raw = np.fromfile(self.path, dtype=np.uint8, count=num_bytes, offset=block.offset)
        if raw.size != num_bytes:
            raise QkovError(
                str(self.path),
                expected=f"{num_bytes} bytes of spilled factors",
                got=f"{raw.size}",
                remedy="The temporary folder was changed during the run; start again.",
            )
        return torch.from_numpy(raw).view(self.dtype).view(block.num_rows, self.width)


class FactorStore:
    """Collects factors batch by batch and gives them back site by site.

    Args:
        budget_bytes: Factors kept in memory; the rest goes to disk.
        folder: Where the temporary folder for spilled factors is made; the system's own by default.
        local: The tensor-parallel shard of each projection, [out, in]. Hooks hand out either all features of a
            projection or exactly those of its shard.

    Attributes:
        spans: Rows (start, stop) of each sample, by its pooled number; the same in every series.
        bytes_in_memory: Size of what is held now.
        bytes_on_disk: Size of what was spilled.
    """

    def __init__(self, budget_bytes: int, folder: Path | None = None, local: Mapping[Site, Rect] | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.bytes_in_memory = 0
        self.bytes_on_disk = 0
        self.spans: dict[int, Span] = {}
        self._local = dict(local or {})
        self._num_rows = 0
        self._series: dict[tuple[str, Site], _Series] = {}
        self._x_site: dict[Site, Site] = {}
        self._added: list[_Series] = []
        self._folder = Path(tempfile.mkdtemp(prefix=SPILLED, dir=folder))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def sites(self) -> frozenset[Site]:
        """The sites that have been captured."""
        return frozenset(self._x_site)

    @property
    def num_rows(self) -> int:
        """Rows of every series: the tokens of all samples."""
        return self._num_rows

    def describe(self) -> dict[str, Any]:
        """What the store holds, as JSON: rows, spans of the samples, shared inputs, and each series with its dtype."""
        return {
            "rows": self._num_rows,
            "spans": [[number, *span] for number, span in self.spans.items()],
            "sharing": [[[s.layer, s.module], [x.layer, x.module]] for s, x in self._x_site.items()],
            "series": [
                [kind, [site.layer, site.module], str(series.dtype).removeprefix("torch.")]
                for (kind, site), series in self._series.items()
            ],
        }

    def close(self) -> None:
        """Forget everything and remove the temporary folder."""
        self._series.clear()
        self._finalizer()

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[FactorStore]:
        """Take one batch's factors; if the batch fails, the store is as if it had not begun."""
        self._added = []
        try:
            yield self
        except BaseException:
            self._drop_added()
            raise
        for number, length in zip(batch.samples, batch.lengths, strict=True):
            self.spans[number] = (self._num_rows, self._num_rows + length)
            self._num_rows += length

    def add(self, factors: Factors) -> None:
        """Take one site's factors (a :class:`~qkov_dist.capture.FactorSink`)."""
        known = self._x_site.setdefault(factors.site, factors.x_site)
        if known != factors.x_site:
            raise QkovError(
                factors.site.module,
                expected=f"the same input as {known.module} in every batch",
                got=f"that of {factors.x_site.module}",
                remedy="The model routes the inputs of its projections differently from batch to batch.",
            )
        self._append("d", factors.site, factors.d)
        x_key = ("x", factors.x_site)
        if not any(series is self._series.get(x_key) for series in self._added):
            self._append("x", factors.x_site, factors.x)

    def x_site(self, site: Site) -> Site:
        """The site whose X this site shares (itself where it shares none).

        Raises:
            QkovError: where nothing was captured at this site.
        """
        if site not in self._x_site:
            raise QkovError(
                f"layer {site.layer} ({site.module})",
                expected="captured factors",
                got="none",
                remedy="Collect this layer first: include it in the layers handed to the collector.",
            )
        return self._x_site[site]

    def x(self, site: Site) -> Window:
        """The inputs of all samples' tokens at one site, [tokens, in]; :attr:`spans` says whose each row is."""
        values = self._series["x", self.x_site(site)].read()
        local = self._local.get(site)
        return Window(values, local.col if local and values.shape[1] == local.shape[1] else 0)

    def d(self, site: Site) -> Window:
        """The output gradients of all samples' tokens at one site, [tokens, out]."""
        self.x_site(site)
        values = self._series["d", site].read()
        local = self._local.get(site)
        return Window(values, local.row if local and values.shape[1] == local.shape[0] else 0)

    def _append(self, kind: str, site: Site, rows: Tensor) -> None:
        rows = rows.detach().cpu()
        series = self._series.get((kind, site))
        if series is None:
            path = self._folder / f"{kind}_{len(self._series):05d}.bin"
            series = self._series[kind, site] = _Series(path, rows.shape[1], rows.dtype)
        if self.bytes_in_memory + rows.nbytes <= self.budget_bytes:
            series.blocks.append(rows)
            self.bytes_in_memory += rows.nbytes
        else:
            self._spill(series, rows)
        self._added.append(series)

    def _drop_added(self) -> None:
        for series in reversed(self._added):
            last = series.drop_last()
            if isinstance(last, _Spilled):
                self.bytes_on_disk -= last.num_rows * series.row_bytes
            else:
                self.bytes_in_memory -= last.nbytes

    def _spill(self, series: _Series, rows: Tensor) -> None:
        try:
            series.spill(rows)
        except OSError as error:
            raise QkovError(
                str(self._folder),
                expected=f"room for {rows.nbytes} bytes of spilled factors",
                got=str(error),
                remedy="Free disk space, set TMPDIR to a larger disk, or raise compute.factor_memory_mb.",
            ) from error
        self.bytes_on_disk += rows.nbytes
