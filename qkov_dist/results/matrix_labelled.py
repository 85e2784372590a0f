"""A matrix of tasks for other tools: pandas by pair and head, xarray by task, task, layer and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .block_view import HEAD_DIM, missing_extra
from .export import as_attribute
from .heatmap import Heatmap
from .labels import NONE, Labels, labelled_as

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

_WORDS = {  # long name, kind of unit, description
    "mean": ("mean score", "score", "over pairs of different samples, i of task and j of task_right"),
    "overlap": ("overlap", NONE, "half the log of cross over within means"),
    "change_sgd": ("change (sgd)", "step", "first-order change of the loss of task for a unit step on task_right"),
    "change_adam": ("change (adam)", "step", "first-order change of the loss of task for a unit step on task_right"),
}


def pairs_to_pandas(heatmaps: Iterable[Heatmap]) -> DataFrame:
    """One row for each pair, block, layer and present native head.

    ``task_a`` and ``task_b`` come first, then the columns of each pair's ``Heatmap.to_pandas``.
    """
    try:
        import pandas
    except ImportError as error:
        raise missing_extra("to_pandas", "pandas") from error
    tables = []
    for heatmap in heatmaps:
        table = heatmap.to_pandas()
        table.insert(0, "task_a", heatmap.task_a)
        table.insert(1, "task_b", heatmap.task_b)
        tables.append(table)
    return pandas.concat(tables, ignore_index=True)


def matrix_to_xarray(
    tasks: Sequence[str],
    axes: Mapping[str, Sequence[int]],
    values: Mapping[str, Mapping[str, npt.NDArray[np.float64]]],
    attributes: Mapping[str, Any],
) -> Dataset:
    """``change_adam_Q`` and its like over (task, task_right, layer, head or kv_head), without copies.

    Everything says what it is and in which units (``labels``).

    Args:
        tasks: Their names.
        axes: ``layer``, ``head`` and ``kv_head``: the model's own numbers.
        values: Block -> name -> [task, task, layer, native head].
        attributes: Of the dataset; what is neither text nor number becomes JSON.

    Raises:
        QkovError: where xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise missing_extra("to_xarray", "xarray") from error
    labels, names = Labels(attributes), np.array(tasks, dtype=object)
    coords: dict[str, Any] = {
        **{name: (name, np.asarray(axis, np.int64), labels.of_axis(name)) for name, axis in axes.items()},
        **{name: (name, names, labels.of_axis(name)) for name in ("task", "task_right")},
    }
    data = {}
    for block, arrays in values.items():
        for name, array in arrays.items():
            long_name, kind, description = _WORDS[name]
            words = labelled_as(f"{long_name} of {block}", labels.unit(kind), description)
            data[f"{name}_{block}"] = (("task", "task_right", "layer", HEAD_DIM[block]), array, words)
    return xarray.Dataset(data, coords, {name: as_attribute(value) for name, value in attributes.items()})
