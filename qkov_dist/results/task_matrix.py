"""The matrix of more than two tasks, as users meet it. What it holds is ``matrix_data``, which says what each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qkov_dist.errors import QkovError, choose
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .heatmap_data import Pairs
from .heatmap_plot import picture
from .matrix_data import MATRIX_KEYS, Floats, MatrixData
from .matrix_labelled import matrix_to_xarray, pairs_to_pandas
from .matrix_order import clustered, cosines_of
from .matrix_pairs import PairRecord, heads_in, of_task, records_of
from .matrix_plot import plot_matrix
from .matrix_verdict import MatrixFacts, MatrixVerdict, matrix_verdict
from .matrix_write import save_matrix
from .notebook import as_html
from .verdict_facts import BY, CHANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from xarray import Dataset


@dataclass(frozen=True, eq=False, repr=False)
class TaskMatrix(MatrixData):
    """What every pair of tasks has in every head; fields are those of :class:`MatrixData`."""

    @property
    def folder(self) -> str:
        """Where the run lies, as commands name it."""
        return str(self.settings("output").get("dir") or "DIR")

    @property
    def title(self) -> str:
        """Model, tasks and numbers of samples: what a figure must say."""
        sizes = sorted({*map(len, self.samples)})
        counted = f"{sizes[0]:,} samples each" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,} samples each"
        tasks = f"{len(self.tasks)} tasks, {counted}"
        path = str(self.settings("model").get("path", "")).rstrip("/").rpartition("/")[2]
        model = path or str(self.attributes.get("model_type", ""))
        return f"{model}: {tasks}" if model else tasks

    def settings(self, section: str) -> Mapping[str, Any]:
        """One section of the run's configuration; empty where the file does not say."""
        config = self.attributes.get("config")
        found: Mapping[str, Any] = config.get(section, {}) if isinstance(config, Mapping) else {}
        return found

    @cached_property
    def verdict(self) -> MatrixVerdict | None:
        """The answer in words; None in files that know no effects, and before they are tested."""
        if not all(record.totals for record in self.records):
            return None
        num_heads = sum(int(mask.sum()) for mask in self.present.values())
        most = max(map(len, self.samples))
        return matrix_verdict(MatrixFacts(self.tasks, most, num_heads, self.records, self._common_head(), self.folder))

    def _common_head(self) -> tuple[str, int]:
        """The head in conflict in most pairs, as ``Q 14.2``, and in how many."""
        best, most = "", -1
        for block in self.blocks:
            counts = np.where(self.present[block], heads_in(self.records, BY, 1, block), -1)
            layer, head = np.unravel_index(int(np.argmax(counts)), counts.shape)
            if counts[layer, head] > most:
                best, most = f"{block} {self.layers[layer]}.{self.natives(block)[head]}", int(counts[layer, head])
        return best, most

    @cached_property
    def records(self) -> tuple[PairRecord, ...]:
        """What is read off every pair, in the order of ``pairs``."""
        return records_of(self.heatmaps[pair] for pair in self.pairs)

    @property
    def has_changes(self) -> bool:
        """Whether effects of steps are known."""
        return all(CHANGE in arrays for arrays in self.values.values())

    def cosines(self, optimizer: str = BY, block: str | None = None) -> Floats:
        """How alike the mean gradients of each two tasks are, [task, task]; see ``matrix_order``.

        Raises:
            QkovError: where effects are not known.
        """
        choose("optimizer", optimizer, OPTIMIZERS)
        return cosines_of(self.total(f"change_{optimizer}", block))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Places of the tasks, like beside like: by cosines of changes, else by overlap."""
        return clustered(self.cosines() if self.has_changes else self.average("overlap"))

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

    def to_pandas(self) -> DataFrame:
        """One row for each pair, block, layer and present head: ``task_a``, ``task_b``, then a heatmap's columns."""
        return pairs_to_pandas(self.heatmaps[pair] for pair in self.pairs)

    def to_xarray(self) -> Dataset:
        """``change_adam_Q`` and its like over task, task_right, layer and head or kv_head, without copies."""
        axes = {"layer": self.layers, "head": self.heads, "kv_head": self.kv_heads}
        return matrix_to_xarray(self.tasks, axes, self.values, self.attributes)

    def plot(self, value: str = "change_adam", block: str | None = None, ax: Axes | None = None) -> Figure:
        """One quantity of all pairs of tasks, like tasks side by side, over all heads or those of a block.

        Args:
            value: One of ``MATRIX_KEYS``, or ``cosine``: changes add up over heads, others are averaged.
            block: Q, K, V or O; all of them by default.
            ax: A matplotlib axis to draw on, in place of a figure of its own.

        Raises:
            QkovError: without matplotlib, and for a block or value that is not there.
        """
        if block is not None:
            choose("block", block, self.blocks)
        values, order = self._plotted(value, block), list(self.order)
        label = f"{value.replace('_', ' ')}, {'all heads' if block is None else f'block {block}'}"
        tasks = [self.tasks[place] for place in order]
        is_signed = value != "mean" or bool((values < 0).any())
        return plot_matrix(values[np.ix_(order, order)], tasks, label, self.title, is_signed=is_signed, axis=ax)

    def _plotted(self, value: str, block: str | None) -> Floats:
        if value == "cosine":
            return self.cosines(block=block)
        return self.total(value, block) if value.startswith("change") else self.average(value, block)

    def _repr_html_(self) -> str:
        verdict = self.verdict
        try:
            drawn = picture(self.plot("cosine" if self.has_changes else "mean"))
        except QkovError:  # without matplotlib
            drawn = None
        rows = [["task", "samples", "pairs that hurt", "pairs that help", "heads in conflict"]]
        for task, table in zip(self.tasks, self.samples, strict=True):
            of = of_task(self.records, task)
            counts = [sum(record.verdict() == kind for record in of) for kind in ("harm", "help")]
            rows.append([task, str(len(table)), *map(str, counts), str(sum(record.count(BY, 1) for record in of))])
        return as_html(repr(self), verdict.sentences if verdict else (), drawn, rows)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name!r} ({len(t)} samples)" for name, t in zip(self.tasks, self.samples, strict=True))
        axes = f"{len(self.layers)} layers, {len(self.heads)} heads, {len(self.kv_heads)} kv heads"
        return f"TaskMatrix({listed}, {axes})"
