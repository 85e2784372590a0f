"""The matrix of more than two tasks, as users meet it. What it holds is ``matrix_data``, which says what each is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qkov_dist.errors import choose

from .heatmap_data import Pairs
from .matrix_data import MATRIX_KEYS, Floats, MatrixData
from .matrix_write import save_matrix


@dataclass(frozen=True, eq=False, repr=False)
class TaskMatrix(MatrixData):
    """What every pair of tasks has in every head; fields are those of :class:`MatrixData`."""

    def total(self, name: str, block: str | None = None) -> Floats:
        """The sum of a change over all heads, or those of a block: [task, task].

        Raises:
            QkovError: for a name that does not add up, or is not there.
        """
        known = sorted({key for arrays in self.values.values() for key in arrays if key.startswith("change")})
        choose("name", name, tuple(known))
        blocks = self.blocks if block is None else (block,)
        total: Floats = np.sum([np.nansum(self.values[b][name], axis=(2, 3)) for b in blocks], axis=0)
        return total

    def average(self, name: str, block: str | None = None) -> Floats:
        """The mean of a quantity over all present heads, or those of a block: [task, task]."""
        choose("name", name, MATRIX_KEYS)
        blocks = self.blocks if block is None else (block,)
        of_heads = np.concatenate([self.values[b][name][:, :, self.present[b]] for b in blocks], axis=-1)
        there = ~np.isnan(of_heads)
        total = np.where(there, of_heads, 0.0).sum(-1)
        count = there.sum(-1)
        average: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return average

    def save(self, path: str | Path, pairs: Pairs = "all") -> None:
        """Write ``heatmap.h5`` of all tasks, atomically.

        Args:
            path: The file.
            pairs: Which scores of sample pairs to keep, of those there are.

        Raises:
            QkovError: where ``path`` holds a file of another run (or none of ours), or cannot be written.
        """
        save_matrix(self, path, pairs)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name!r} ({len(t)} samples)" for name, t in zip(self.tasks, self.samples, strict=True))
        axes = f"{len(self.layers)} layers, {len(self.heads)} heads, {len(self.kv_heads)} kv heads"
        return f"TaskMatrix({listed}, {axes})"
