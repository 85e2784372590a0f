"""A heatmap as labelled arrays, and what other tools make of them: netCDF-shaped HDF5, xarray, pandas.

Every array is named once, by its path in the file (``fisher/Q/min``), with its dimensions. The axes carry the model's
own numbers: ``layer``, ``head`` (query heads), ``kv_head``; ``sample_a``, ``sample_b`` and the pooled ``sample`` count
from 0, A's first. The right axis of pooled scores is ``sample_right``: xarray wants no dimension twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qkov_dist.scoring.influence_records import OPTIMIZERS

from .block_view import HEAD_DIM, missing_extra
from .hdf5_write import Writer, writing
from .labels import Labels

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset

COLUMN_NAMES = {"heatmap": "score_mean"}


@dataclass(frozen=True)
class Variable:
    """One array of numbers, or one tuple of strings."""

    path: str
    dims: tuple[str, ...]
    values: npt.NDArray[Any] | tuple[str, ...]

    def write(self, writer: Writer, folder: str = "", scales: Mapping[str, str] | None = None) -> None:
        """Write it into a file.

        Args:
            writer: Of the file.
            folder: The group that ``path`` is in, with a slash at its end.
            scales: Where dimensions have their scales that are not at the root.
        """
        dims = [(scales or {}).get(dim, dim) for dim in self.dims]
        if isinstance(self.values, tuple):
            writer.strings(f"{folder}{self.path}", self.values, dims)
        else:
            writer.array(f"{folder}{self.path}", self.values, dims)


@dataclass(frozen=True)
class LabelledArrays:
    """Coordinates by dimension, variables over them, and attributes."""

    coords: Mapping[str, npt.NDArray[Any]]
    variables: tuple[Variable, ...]
    attributes: Mapping[str, Any]

    def write(self, path: Path, run_id: str) -> None:
        """Write one HDF5 file, atomically; coordinates become dimension scales at its root.

        Raises:
            QkovError: where ``path`` holds a file of another run, or cannot be written.
        """
        with writing(path, run_id) as writer:
            writer.attributes(self.attributes)
            for name, values in self.coords.items():
                writer.scale(name, values)
            for variable in self.variables:
                variable.write(writer)

    def to_xarray(self, attributes: Mapping[str, Any] | None = None) -> Dataset:
        """An xarray Dataset; ``fisher/Q/min`` becomes ``fisher_Q_min``, samples become coordinates.

        Effects of a step have the dimension ``optimizer``; arrays are not copied but for these. Everything says what it
        is and in which units (``labels``).

        Args:
            attributes: More of them, for the whole.
        """
        try:
            import xarray
        except ImportError as error:
            raise missing_extra("to_xarray", "xarray") from error
        labels = Labels(self.attributes)
        coords: dict[str, Any] = {name: (name, values, labels.of_axis(name)) for name, values in self.coords.items()}
        data: dict[str, Any] = {}
        for variable in with_optimizers(self.variables):
            root, *rest = variable.path.split("/")
            labelled = (variable.dims, np.asarray(variable.values), labels.of(variable.path))
            if root == "samples":
                coords[f"{rest[1]}_{rest[0]}"] = labelled
            else:
                data["_".join(rest if root in ("statistics", "shared") else (root, *rest))] = labelled
            if "optimizer" in variable.dims:
                coords["optimizer"] = ("optimizer", np.array(OPTIMIZERS), labels.of_axis("optimizer"))
        stored = {name: as_attribute(value) for name, value in {**self.attributes, **(attributes or {})}.items()}
        return xarray.Dataset(data, coords, stored)

    def quantities(self, block: str) -> dict[str, npt.NDArray[Any]]:
        """Name -> [layer, native head] of all that a block's heads have, by the names of ``to_pandas``."""
        return _quantities(block, self.variables)

    def to_pandas(self) -> DataFrame:
        """One row for each present native head: block, layer, head, kv_head, then a column for each quantity.

        ``head`` counts query heads for Q and O and kv heads for K and V; ``kv_head`` is the kv head that a query head
        reads, or the kv head itself.
        """
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("to_pandas", "pandas") from error
        arrays = {variable.path: variable for variable in self.variables}
        blocks = [block for block in HEAD_DIM if f"heatmap/{block}" in arrays]
        tables = [pandas.DataFrame(_block_columns(block, self.coords, arrays)) for block in blocks]
        return pandas.concat(tables, ignore_index=True)


def _block_columns(
    block: str, coords: Mapping[str, npt.NDArray[Any]], arrays: Mapping[str, Variable]
) -> dict[str, npt.NDArray[Any]]:
    layer, head = np.nonzero(np.asarray(arrays[f"present/{block}"].values))
    numbers = coords[HEAD_DIM[block]][head]
    groups = np.asarray(arrays["group"].values)[layer]
    columns: dict[str, npt.NDArray[Any]] = {
        "block": np.full(len(layer), block),
        "layer": coords["layer"][layer],
        "head": numbers,
        "kv_head": numbers // groups if HEAD_DIM[block] == "head" else numbers,
    }
    return columns | {name: values[layer, head] for name, values in _quantities(block, arrays.values()).items()}


def _quantities(block: str, variables: Iterable[Variable]) -> dict[str, npt.NDArray[Any]]:
    """Name -> [layer, native head] of all that a block's heads have, by the names of columns."""
    found: dict[str, npt.NDArray[Any]] = {}
    for variable in variables:
        root, *rest = variable.path.split("/")
        if block in rest and variable.dims == ("layer", HEAD_DIM[block]) and root != "present":
            parts = rest if root == "statistics" else (COLUMN_NAMES.get(root, root), *rest)
            if root == "effects":  # change_adam, as everywhere
                parts = (rest[-1], rest[-2])
            found["_".join(part for part in parts if part != block)] = np.asarray(variable.values)
    return found


def with_optimizers(variables: Iterable[Variable]) -> Iterator[Variable]:
    """The same, where what stands under ``sgd`` and ``adam`` apart is one array [optimizer, ...] under neither."""
    apart: dict[str, dict[str, Variable]] = {}
    for variable in variables:
        root, *rest = variable.path.split("/")
        if root in ("effects", "influences") and rest[1] in OPTIMIZERS:
            apart.setdefault("/".join([root, rest[0], *rest[2:]]), {})[rest[1]] = variable
        else:
            yield variable
    for path, by_optimizer in apart.items():
        values = np.stack([np.asarray(by_optimizer[name].values) for name in OPTIMIZERS])
        yield Variable(path, ("optimizer", *by_optimizer[OPTIMIZERS[0]].dims), values)


def as_attribute(value: Any) -> Any:
    """What netCDF takes for an attribute: it knows no truth values, and no trees."""
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, str | int | float | np.ndarray) else json.dumps(value, default=str)


def split_arrays(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Split nested dicts into arrays of numbers by path, and the tree of what else there is."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    others: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            below, rest = split_arrays(value, f"{prefix}{name}/")
            arrays |= below
            if rest or not below:
                others[name] = rest
        elif isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "fiub":
            arrays[f"{prefix}{name}"] = value
        else:
            others[name] = value
    return arrays, others
