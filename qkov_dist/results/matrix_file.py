"""heatmap.h5 of more than two tasks.

    /layer /head /kv_head /task /task_right /sample_0 /sample_1 ...     dimension scales
    /tasks                 [task]                       names, in the order of the configuration
    /matrix/{B}/{mean,overlap,change_sgd,change_adam}   [task, task_right, layer, head] float64 (``task_matrix``)
    /samples/{task}/{id,num_tokens,loss,text,content}   [sample_n]
    /group, /present/{B}, /fisher/{B}/{mean,min,ridge_share}    as of two tasks; the Fisher is that of all
    /pairs/{a}__{b}/...    what a file of these two tasks holds at its root (``heatmap_file``); what is the same for all
                           pairs (axes, samples, the Fisher) is there by a hard link, once in the file

Attributes of a pair are those that differ from the root's, with ``task_a`` and ``task_b``. ``load_heatmap`` reads one
pair, ``load_matrix`` all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from qkov_dist.config import FEWEST_TASKS, MOST_TASKS
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS

from .block_view import HEAD_DIM
from .disk import DAMAGED
from .hdf5_read import Reader, reading
from .heatmap import Heatmap
from .heatmap_checks import check_attributes, check_axes
from .heatmap_file import heatmap_path, load_heatmap, read_samples, task_names
from .matrix_data import MATRIX_KEYS, Pair
from .task_matrix import TaskMatrix


class StoredHeatmaps(Mapping[Pair, Heatmap]):
    """Every pair's heatmap in a file, without scores of sample pairs, read when it is asked for.

    Args:
        path: The file.
        tasks: Names of all tasks.
    """

    def __init__(self, path: Path, tasks: tuple[str, ...]) -> None:
        self._path, self._pairs = path, tuple(combinations(tasks, 2))

    def __getitem__(self, pair: Pair) -> Heatmap:
        if pair not in self._pairs:
            raise KeyError(pair)
        return load_heatmap(self._path, pair, with_scores=False)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


def load_matrix(path: str | Path) -> TaskMatrix:
    """Read what a run of more than two tasks says of all of them.

    Args:
        path: The file, or the folder of a run, in which it is ``heatmap.h5``.

    Raises:
        QkovError: naming the file, for a file of two tasks, and for anything that is missing, damaged, of another
            schema, or outside the file.
    """
    place = heatmap_path(path)
    with reading(place) as reader:
        tasks = task_names(reader)
        if tasks is None:
            remedy = "It holds two tasks: use load_heatmap."
            raise QkovError("matrix", expected="a file of more than two tasks", got="one of two", remedy=remedy)
        return _matrix(reader, place, tasks)


def has_many_tasks(path: str | Path) -> bool:
    """Whether a file of results is one of more than two tasks."""
    with reading(heatmap_path(path)) as reader:
        return task_names(reader) is not None


def _matrix(reader: Reader, path: Path, tasks: tuple[str, ...]) -> TaskMatrix:
    if not FEWEST_TASKS < len(tasks) <= MOST_TASKS or len({*tasks}) < len(tasks):
        raise QkovError("tasks", expected=f"3 to {MOST_TASKS} different names", got=f"{len(tasks)}", remedy=DAMAGED)
    axes = {name: reader.array(name, kinds="iu") for name in ("layer", "head", "kv_head")}
    layers, heads, kv_heads = (tuple(axis.tolist()) for axis in axes.values())
    groups = reader.array("group", (len(layers),), "iu").astype(np.int64)
    check_axes(layers, heads, kv_heads, groups)
    blocks = [block for block in BLOCKS if reader.has(f"matrix/{block}")]
    attributes = {name: value for name, value in reader.attributes().items() if name not in ("schema", "tasks")}
    check_attributes(attributes)
    shapes = {block: (len(layers), len(axes[HEAD_DIM[block]])) for block in blocks}
    num = len(tasks)
    return TaskMatrix(
        tasks,
        layers,
        heads,
        kv_heads,
        groups,
        tuple(read_samples(reader, f"samples/{task}", f"sample_{number}") for number, task in enumerate(tasks)),
        {block: reader.array(f"present/{block}", shape, "b") for block, shape in shapes.items()},
        {
            block: {
                key: reader.array(f"matrix/{block}/{key}", (num, num, *shape))
                for key in MATRIX_KEYS
                if reader.has(f"matrix/{block}/{key}")
            }
            for block, shape in shapes.items()
        },
        StoredHeatmaps(path, tasks),
        attributes,
        partial(load_heatmap, path),
    )
