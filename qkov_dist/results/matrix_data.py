"""Many tasks: what every ordered pair of tasks has in every head, and each pair's own heatmap.

Samples of all tasks were captured once and scored once among all, under the Fisher of all of them. For tasks t and u

    mean[t, u]         mean score over pairs of different samples, i in t and j in u; within a task where t = u
    overlap[t, u]      1/2 log(mean[t, u] mean[u, t] / (mean[t, t] mean[u, u])), symmetric, 0 on the diagonal; NaN for
                       scores that may be negative
    change_sgd[t, u]   first-order change of t's loss for a unit step on u, symmetric; on the diagonal a task's change
    change_adam[t, u]  by a step on itself, over pairs of different samples

A pair's heatmap is that of a run of two tasks, but for the Fisher. Pairs are named in the order of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError, choose
from qkov_dist.layout.heads import BLOCKS

from .block_view import HEAD_DIM, Ints
from .heatmap import Heatmap
from .heatmap_data import SampleTable

Floats = npt.NDArray[np.float64]
Pair = tuple[str, str]
MATRIX_KEYS = ("mean", "overlap", "change_sgd", "change_adam")


@dataclass(frozen=True, eq=False, repr=False)
class MatrixData:
    """What every pair of tasks has in every head.

    Args:
        tasks: Names of the tasks, in the order of the configuration.
        layers: Model layer numbers scored.
        heads: Query heads selected.
        kv_heads: Kv heads that these read, over all layers.
        groups: Query heads of one kv head, [layer].
        samples: The samples of each task.
        present: Block -> whether the layer has this head, bool [layer, native head].
        values: Block -> name (``MATRIX_KEYS``; of changes none where effects were left out) -> float64
            [task, task, layer, native head], NaN for absent heads.
        heatmaps: (task, task) -> the pair's heatmap. Of a file each is read when it is asked for, without scores of
            sample pairs.
        attributes: run_id, score, config, versions, warnings, notes, ...: those of all pairs.
        whole: Reads a pair's heatmap with the scores that the file has; None where ``heatmaps`` have them.
    """

    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    groups: Ints
    samples: tuple[SampleTable, ...]
    present: Mapping[str, npt.NDArray[np.bool_]]
    values: Mapping[str, Mapping[str, Floats]]
    heatmaps: Mapping[Pair, Heatmap]
    attributes: Mapping[str, Any]
    whole: Callable[[Pair], Heatmap] | None = None

    def __post_init__(self) -> None:
        num = len(self.tasks)
        for block, arrays in self.values.items():
            shape = (num, num, len(self.layers), len(self.natives(block)))
            for name, array in arrays.items():
                if array.shape != shape:
                    remedy = "Build matrices through qkov_dist, or fix this array."
                    where = f"matrix: {block} {name}"
                    raise QkovError(where, expected=f"shape {shape}", got=f"{array.shape}", remedy=remedy)

    @property
    def run_id(self) -> str:
        """What the run was, hashed; "" where nobody said."""
        return str(self.attributes.get("run_id", ""))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks scored, in the order Q, K, V, O."""
        return tuple(block for block in BLOCKS if block in self.values)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair of tasks once, in the order of the configuration."""
        return tuple(combinations(self.tasks, 2))

    def natives(self, block: str) -> tuple[int, ...]:
        """Head numbers along a block's native axis."""
        return self.heads if HEAD_DIM[block] == "head" else self.kv_heads

    def heatmap(self, task_a: str, task_b: str) -> Heatmap:
        """The heatmap of one pair.

        Raises:
            QkovError: for a task that is not there, and for a pair in another order than the configuration's.
        """
        pair = checked_pair(self.tasks, (task_a, task_b))
        return self.heatmaps[pair] if self.whole is None else self.whole(pair)


def checked_pair(tasks: tuple[str, ...], pair: tuple[str, ...]) -> Pair:
    """A pair of the tasks, in their order.

    Raises:
        QkovError: for anything else.
    """
    if len(pair) != 2 or isinstance(pair, str):
        remedy = f"Name two of {', '.join(tasks)}."
        raise QkovError("pair", expected="two names of tasks", got=repr(pair), remedy=remedy)
    for name in pair:
        choose("pair", name, tasks)
    first, second = pair
    if tasks.index(first) >= tasks.index(second):
        remedy = (
            f"Ask for ({second!r}, {first!r}): pairs are in the order of the configuration. Scores with the roles "
            "exchanged are in the matrix; a change is that of either task by a step on the other."
        )
        raise QkovError("pair", expected="two different tasks in their order", got=f"{pair}", remedy=remedy)
    return first, second


def pair_group(task_a: str, task_b: str) -> str:
    """Where the heatmap of two of more tasks is in their file."""
    return f"pairs/{task_a}__{task_b}"
