"""What a matrix of tasks needs of every layer, besides the heatmaps of its pairs: means of all blocks of pooled scores,
and what a step on a task does to that task itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qkov_dist.data.copies import different_pairs, in_one_task
from qkov_dist.scoring.influence_records import OPTIMIZERS, own_of
from qkov_dist.scoring.influence_sums import parts_of
from qkov_dist.scoring.score_kinds import may_be_negative

from .assemble import block_of
from .heatmap import Heatmap
from .influences import without_self_pairs
from .matrix_data import Pair
from .metadata import HeatmapMetadata
from .partial_schema import Floats, LayerPartial
from .task_matrix import TaskMatrix

ByName = dict[str, np.ndarray]


class MatrixSums:
    """Takes whole layers (summed over ranks) of all tasks, and makes a matrix of them and of the pairs' heatmaps.

    Args:
        metadata: Axes, all tasks' samples, and provenance.
    """

    def __init__(self, metadata: HeatmapMetadata) -> None:
        self.metadata, self._parts = metadata, parts_of(metadata.sizes)
        contents = [table.contents for table in metadata.samples]
        self._different = different_pairs([text for of_task in contents for text in of_task])
        counts = in_one_task(contents)
        self._counted = [int(counts[part].sum()) for part in self._parts]
        num, layers = len(metadata.tasks), len(metadata.layers)
        self._values: dict[str, ByName] = {
            block: {"mean": np.full((num, num, layers, len(metadata.axis(block))), np.nan)} for block in metadata.blocks
        }
        self._places = {layer.layer: place for place, layer in enumerate(metadata.layers)}

    def take(self, number: int, part: LayerPartial) -> None:
        """Take one layer: scores among all pooled samples, and records of all tasks.

        Raises:
            QkovError: for a head of it that is missing.
        """
        layer = self.metadata.layers[self._places[number]]
        for block in (block for block in self.metadata.blocks if block in layer.heads):
            found, values = block_of(part, layer, block), self._values[block]
            at = self._places[number], np.searchsorted(self.metadata.axis(block), found.heads)
            values["mean"][:, :, at[0], at[1]] = self._means(found.scores)
            if found.influences.shape[-1]:
                for name, own in self._own(found.influences).items():
                    diagonal = values.setdefault(name, np.full_like(values["mean"], np.nan))
                    for task, of_task in enumerate(own):
                        diagonal[task, task, at[0], at[1]] = of_task

    def _means(self, scores: Floats) -> np.ndarray:
        """Mean scores over pairs of different samples, [task, task, heads], of scores [heads, N, N]."""
        found = np.full((len(self._parts), len(self._parts), len(scores)), np.nan)
        for t, rows in enumerate(self._parts):
            for u, cols in enumerate(self._parts):
                pairs = self._different[rows, cols]
                if pairs.any():
                    total = np.where(pairs, scores[:, rows, cols], 0.0).sum(axis=(1, 2), dtype=np.float64)
                    found[t, u] = total / pairs.sum()
        return found

    def _own(self, influences: np.ndarray) -> dict[str, list[np.ndarray]]:
        """By optimizer, each task's change by a unit step on itself, [heads], over pairs of different samples."""
        num_tasks, found = len(self._parts), {}
        for place, optimizer in enumerate(OPTIMIZERS):
            both = [own_of(influences[:, place], num_tasks, task) for task in range(num_tasks)]
            counted = zip(both, self._counted, strict=True)
            found[f"change_{optimizer}"] = [without_self_pairs(*sums, num) for sums, num in counted]
        return found

    def matrix(self, heatmaps: Mapping[Pair, Heatmap]) -> TaskMatrix:
        """The matrix, from all pairs' heatmaps, tested or not."""
        metadata, first = self.metadata, next(iter(heatmaps.values()))
        score = metadata.attributes.get("score")
        for values in self._values.values():
            values["overlap"] = _overlap(values["mean"], may_be_negative(score))
        for (a, b), heatmap in heatmaps.items():
            t, u = metadata.tasks.index(a), metadata.tasks.index(b)
            for block, of_block in (heatmap.effects or {}).items():
                for optimizer, arrays in of_block.items():
                    change = arrays["change"]
                    self._values[block][f"change_{optimizer}"][[t, u], [u, t]] = change
        return TaskMatrix(
            metadata.tasks,
            first.layers,
            first.heads,
            first.kv_heads,
            first.groups,
            metadata.samples,
            first.present,
            self._values,
            heatmaps,
            {**metadata.attributes, "warnings": _joined(heatmaps, "warnings"), "notes": _joined(heatmaps, "notes")},
        )


def _overlap(mean: np.ndarray, may_be_negative: bool) -> np.ndarray:
    """1/2 log(M_tu M_ut / (M_tt M_uu)), from means [task, task, layer, head]; NaN where it is none."""
    if may_be_negative:
        return np.full_like(mean, np.nan)
    within = np.stack([mean[task, task] for task in range(len(mean))])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 0.5 * np.log(mean * mean.swapaxes(0, 1) / (within[:, None] * within[None]))
    return np.where(np.isfinite(found), found, np.nan)


def _joined(heatmaps: Mapping[Pair, Heatmap], name: str) -> list[str]:
    """What is said of any pair, once; with the pair's name where it is not said of all."""
    said: dict[str, list[Pair]] = {}
    for pair, heatmap in heatmaps.items():
        for text in dict.fromkeys(heatmap.attributes.get(name, ())):
            said.setdefault(text, []).append(pair)
    return [text if len(pairs) == len(heatmaps) else f"{_listed(pairs)}: {text}" for text, pairs in said.items()]


_LISTED = 3  # pairs in a warning


def _listed(pairs: Sequence[Pair]) -> str:
    names = ", ".join(f"{a} and {b}" for a, b in pairs[:_LISTED])
    return names if len(pairs) <= _LISTED else f"{names} and {len(pairs) - _LISTED} more pairs"
