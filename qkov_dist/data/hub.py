"""Rows of a dataset of the Hugging Face hub, or of a folder laid out like one, by the library ``datasets``.

Rows are streamed: no more are fetched than are asked for. A slice of a split is streamed too, where its ends follow
from what it says or from the number of rows that the dataset is said to have; else the split is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from qkov_dist.errors import QkovError
from qkov_dist.values import readable

from .arrow_files import Names, named_class, needed_module
from .columns import Columns, check_names, no_column, without_nulls
from .rows import Budget, Content, Unread

FORM = "hf:HUB_ID[:CONFIG][:SPLIT][#COLUMN]"
_PLAIN_SLICE = re.compile(r"([\w.]+)\[(\d*):(\d*)\]")  # its ends say all by themselves


class HubPath(NamedTuple):
    """What ``hf:HUB_ID[:CONFIG][:SPLIT][#COLUMN]`` names; a lone part may be a config or a split."""

    hub_id: str
    parts: tuple[str, ...]
    column: str | None


def hub_path(path: str) -> HubPath:
    """A path taken apart; raises QkovError where it is none."""
    source, mark, column = path.removeprefix("hf:").partition("#")
    hub_id, *parts = re.split(r":(?![^\[]*\])", source)
    if not hub_id or (mark and not column) or len(parts) > 2:
        remedy = "Write for example hf:org/dataset:main:train[:200]."
        raise QkovError(path, expected=FORM, got=repr(path), remedy=remedy)
    return HubPath(hub_id, tuple(parts), column or None)


def hub_rows(path: str, budget: Budget, columns: Columns | None) -> Iterator[Unread]:
    """The rows of a split, or of a slice of one.

    Raises:
        QkovError: where the dataset cannot be had, or lacks a column.
    """
    place = hub_path(path)
    if columns is not None and place.column is not None:
        remedy = "Leave '#COLUMN' out of the path, or leave columns out."
        raise QkovError(path, expected="columns, or one column in the path", got="both", remedy=remedy)
    datasets: Any = needed_module("datasets", path)
    failures = (
        *(OSError, ValueError, LookupError, RuntimeError, TypeError, NotImplementedError, ImportError),
        *(datasets.exceptions.DatasetsError, needed_module("pyarrow", path).ArrowException),
    )
    try:
        with _quiet(datasets):
            for number, (row, classes) in enumerate(_streamed(datasets, place, path, columns), 1):
                budget.spend(0, path, number)
                yield Unread(f"{path}:{number}", number, partial(_content, row, classes, place.column, path, number))
    except QkovError:
        raise
    except failures as error:
        remedy = "Check the dataset's id, config and split, and the network."
        got = readable(" ".join(str(error).split()).rstrip(".") or type(error).__name__)
        raise QkovError(path, expected="a readable dataset", got=got, remedy=remedy) from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """The library without its progress bars, and without a line of its own for what becomes our message."""
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _streamed(datasets: Any, place: HubPath, path: str, columns: Columns | None) -> Iterator[tuple[Content, Names]]:
    """Rows, each with the names of classes by column."""
    name, split = _config_and_split(datasets, place)
    for part in _slices(datasets, place.hub_id, name, split):
        found = part.column_names
        classes = {key: value.names for key, value in (part.features or {}).items() if hasattr(value, "names")}
        wanted = _wanted(place, columns, found)
        if found is not None and place.column is None:
            check_names(path, found, columns)
        for row in part.select_columns(wanted) if wanted and {*wanted} <= {*(found or ())} else part:
            if found is None and place.column is None:
                found = [*row]
                check_names(path, found, columns)
            yield row, classes


def _wanted(place: HubPath, columns: Columns | None, found: list[str] | None) -> list[str]:
    """The columns to read alone; none where all are."""
    if columns is not None:
        return [*columns.names]
    return [] if place.column is None else [place.column, *(["tools"] if "tools" in (found or ()) else [])]


def _config_and_split(datasets: Any, place: HubPath) -> tuple[str | None, str]:
    """A lone part is a config where the dataset has one of that name."""
    parts = place.parts
    lone_config = len(parts) == 1 and parts[0] in datasets.get_dataset_config_names(place.hub_id)
    name = parts[0] if len(parts) == 2 or lone_config else None
    return name or None, (parts[-1] if parts and not lone_config else "") or "train"


def _slices(datasets: Any, hub_id: str, name: str | None, split: str) -> Iterator[Any]:
    """What a split consists of, as streams where that can be."""
    if "[" not in split:
        yield datasets.load_dataset(hub_id, name, split=split, streaming=True)
        return
    ranges = _ranges(datasets, hub_id, name, split)
    if ranges is None:
        yield datasets.load_dataset(hub_id, name, split=split)
        return
    for whole, start, stop in ranges:
        rows = datasets.load_dataset(hub_id, name, split=whole, streaming=True).skip(start)
        yield rows if stop is None else rows.take(stop - start)


def _ranges(datasets: Any, hub_id: str, name: str | None, split: str) -> list[tuple[str, int, int | None]] | None:
    """Splits with first and last row; None where only the data say which rows are meant."""
    if plain := _PLAIN_SLICE.fullmatch(split):
        start, stop = int(plain[2] or 0), int(plain[3]) if plain[3] else None
        return [(plain[1], start, stop if stop is None else max(stop, start))]
    known = datasets.load_dataset_builder(hub_id, name).info.splits or {}
    lengths = {key: value.num_examples for key, value in known.items()}
    instruction = datasets.ReadInstruction.from_spec(split)
    if not lengths or not all(lengths.values()):
        return None
    return [(part.splitname, part.from_, part.to) for part in instruction.to_absolute(lengths)]


def _content(row: Content, classes: Names, column: str | None, path: str, number: int) -> Content:
    content = {
        key: named_class(value, classes[key]) if key in classes else without_nulls(value) for key, value in row.items()
    }
    if column is None:
        return content
    if column not in content:
        raise no_column(f"{path}:{number}", column, content)
    return _one_column(content, column)


def _one_column(content: Content, column: str) -> Content:
    """A column by what it holds: text, messages (beside ``tools``) or token ids."""
    value = content[column]
    if not isinstance(value, list):
        return {"text": value}
    if not value or not isinstance(value[0], dict):
        return {"input_ids": value}
    return {"messages": value, **({"tools": content["tools"]} if content.get("tools") else {})}
