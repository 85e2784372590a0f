"""A matrix of tasks for other tools: pandas by pair and head, xarray by task, task, layer and head."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .block_view import HEAD_DIM, missing_extra
from .heatmap import Heatmap

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

LONG_NAMES = {
    "mean": "mean score over pairs of different samples, i of task and j of task_right",
    "overlap": "half the log of cross over within means",
    "change_sgd": "first-order change of the loss of task for a unit step of sgd on task_right",
    "change_adam": "first-order change of the loss of task for a unit step of adam on task_right",
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
    unit: str,
) -> Dataset:
    """``change_adam_Q`` and its like over (task, task_right, layer, head or kv_head), without copies.

    Args:
        tasks: Their names.
        axes: ``layer``, ``head`` and ``kv_head``: the model's own numbers.
        values: Block -> name -> [task, task, layer, native head].
        attributes: Of the dataset; what is neither text nor number becomes JSON.
        unit: Of losses.

    Raises:
        QkovError: where xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise missing_extra("to_xarray", "xarray") from error
    names = np.array(tasks, dtype=object)
    coords: dict[str, Any] = {**{name: np.asarray(axis, np.int64) for name, axis in axes.items()}}
    coords |= {"task": ("task", names, {"long_name": "task whose loss changes"})}
    coords |= {"task_right": ("task_right", names, {"long_name": "task stepped on"})}
    data = {
        f"{name}_{block}": (
            ("task", "task_right", "layer", HEAD_DIM[block]),
            array,
            {"long_name": f"{LONG_NAMES[name]}, block {block}", "units": unit if name.startswith("change") else "1"},
        )
        for block, arrays in values.items()
        for name, array in arrays.items()
    }
    kept = {
        name: value if isinstance(value, str | int | float | np.ndarray) else json.dumps(value, default=str)
        for name, value in attributes.items()
    }
    return xarray.Dataset(data, coords, kept)
