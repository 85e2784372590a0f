"""Writing the file of more than two tasks; how it lies is in ``matrix_file``, which reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .block_view import HEAD_DIM
from .export import LabelledArrays, Variable
from .hdf5_write import Writer, writing
from .heatmap_data import Pairs
from .labelled import labelled, sample_columns
from .matrix_data import MatrixData, Pair, pair_group

_SHARED = ("group", "present", "fisher", "samples")  # of a pair's variables: perhaps the same for all pairs
_OWN = ("share_a", "elsewhere")  # among them those that are not


def save_matrix(matrix: MatrixData, path: str | Path, pairs: Pairs = "all") -> None:
    """Write ``heatmap.h5`` of all tasks, atomically.

    Args:
        matrix: The tasks, and the heatmaps of all pairs.
        path: The file.
        pairs: Which scores of sample pairs to keep, of those there are.

    Raises:
        QkovError: where ``path`` holds a file of another run (or none of ours), or cannot be written.
    """
    with writing(Path(path), matrix.run_id) as writer:
        writer.attributes({**matrix.attributes, "tasks": list(matrix.tasks)})
        for name, values in _coords(matrix).items():
            writer.scale(name, values)
        for variable in _variables(matrix):
            variable.write(writer)
        for names in matrix.pairs:
            _write_pair(writer, matrix, names, labelled(matrix.heatmap(*names), pairs))


def _coords(matrix: MatrixData) -> dict[str, np.ndarray]:
    num = len(matrix.tasks)
    return {
        "layer": np.array(matrix.layers, np.int64),
        "head": np.array(matrix.heads, np.int64),
        "kv_head": np.array(matrix.kv_heads, np.int64),
        "task": np.arange(num),
        "task_right": np.arange(num),
        **{f"sample_{number}": np.arange(len(table)) for number, table in enumerate(matrix.samples)},
    }


def _variables(matrix: MatrixData) -> Iterator[Variable]:
    yield Variable("tasks", ("task",), matrix.tasks)
    yield Variable("group", ("layer",), np.asarray(matrix.groups, np.int64))
    for number, (task, table) in enumerate(zip(matrix.tasks, matrix.samples, strict=True)):
        for name, values in sample_columns(table).items():
            yield Variable(f"samples/{task}/{name}", (f"sample_{number}",), values)
    fisher = matrix.heatmaps[matrix.pairs[0]].fisher
    for block in matrix.blocks:
        dims = ("layer", HEAD_DIM[block])
        yield Variable(f"present/{block}", dims, matrix.present[block])
        for key in (key for key in fisher[block] if key not in _OWN):
            yield Variable(f"fisher/{block}/{key}", dims, fisher[block][key])
        for key, values in matrix.values[block].items():
            yield Variable(f"matrix/{block}/{key}", ("task", "task_right", *dims), values)


def _write_pair(writer: Writer, matrix: MatrixData, names: Pair, arrays: LabelledArrays) -> None:
    """One pair's group: what is the same as at the root by hard links."""
    group, dims = pair_group(*names), dict.fromkeys(("layer", "head", "kv_head"), "")
    for name, values in arrays.coords.items():
        if name in dims:
            writer.link(f"{group}/{name}", name)
        else:
            writer.scale(f"{group}/{name}", values)
    own_dims = {name: f"{group}/{name}" for name in arrays.coords if name not in dims}
    for variable in arrays.variables:
        root, *rest = variable.path.split("/")
        if root in _SHARED and not set(_OWN) & {*rest}:
            if root == "samples":
                rest = [names["ab".index(rest[0])], *rest[1:]]
            writer.link(f"{group}/{variable.path}", "/".join([root, *rest]))
        else:
            variable.write(writer, f"{group}/", own_dims)
    of_all = {**matrix.attributes, "tasks": list(matrix.tasks)}
    shared = {key for key, value in of_all.items() if arrays.attributes.get(key) == value}
    own = {key: value for key, value in arrays.attributes.items() if key not in shared}
    writer.attributes(own, group)
