"""Where a task's rows come from: files by their ending, built-in text, or a dataset of the hub.

A row is what a sample's keys hold, with its place (``FILE:LINE``, or ``FILE:ROW`` of tables that have no lines) and its
number; whether that makes a sample is no business of this module.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from qkov_dist.config import TaskConfig
from qkov_dist.errors import QkovError

from .arrow_files import arrow_rows
from .builtin import MAX_SAMPLES, builtin_samples
from .columns import Columns, lists_of_text
from .csv_files import csv_rows
from .hub import hub_rows
from .json_files import json_rows, jsonl_rows
from .rows import Budget, Content, Row, Unread, drawn

Reader = Callable[[Path, Budget], Iterator[Unread]]
PACKABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # the standard library reads them, also with .gz behind
ENDINGS = (*PACKABLE, ".parquet", ".arrow", ".feather")


def rows(config: TaskConfig) -> Iterator[Row]:
    """The rows that a task takes: its first ``max_samples``, or as many drawn from all of them.

    Raises:
        QkovError: where the source cannot be read, has no such columns, or a row is no JSON object.
    """
    columns = None if config.columns is None else Columns.of(config.columns)
    budget = Budget(limited=config.sample == "first")
    unread = (row._replace(read=partial(_sample, row, columns)) for row in _unread(config, budget, columns))
    if config.sample == "random" and config.max_samples is not None:
        yield from drawn(unread, config.max_samples, config.sample_seed)
    else:
        yield from (row.row() for row in islice(unread, config.max_samples))


def _sample(row: Unread, columns: Columns | None) -> Content:
    content = row.read()
    return lists_of_text(content if columns is None else columns.sample(content, row.place))


def _unread(config: TaskConfig, budget: Budget, columns: Columns | None) -> Iterator[Unread]:
    if config.path.startswith("builtin:"):
        count = MAX_SAMPLES if config.sample == "random" else config.max_samples
        for number, content in enumerate(builtin_samples(config.path, count), 1):
            yield Unread(f"{config.path}:{number}", number, partial(dict, content))
    elif config.path.startswith("hf:"):
        yield from hub_rows(config.path, budget, columns)
    else:
        yield from _file_rows(config.path, budget, columns)


def _file_rows(path: str, budget: Budget, columns: Columns | None) -> Iterator[Unread]:
    """The rows of all files that a path or pattern names, numbered on from file to file."""
    readers = [(file, _reader(file, columns)) for file in _files(path)]
    before = 0
    for file, reader in readers:
        last = 0
        for row in reader(file, budget):
            last = row.number
            yield row._replace(number=before + last)
        before += last


def _files(path: str) -> list[Path]:
    """The file of this name, or those of this pattern, sorted by name."""
    if Path(path).is_dir():
        remedy = f"Name its files by a pattern in quotes, such as {str(Path(path, '*.jsonl'))!r}."
        raise QkovError(path, expected="a readable file", got="Is a directory", remedy=remedy)
    if not glob.has_magic(path) or Path(path).exists():
        return [Path(path)]
    found = sorted(file for name in glob.glob(path, recursive=True) if (file := Path(name)).is_file())  # noqa: PTH207 - may be absolute
    if not found:
        remedy = f"Check the pattern; it is taken from {Path.cwd()}."
        raise QkovError(path, expected="files of this pattern", got="none", remedy=remedy)
    return found


def _reader(file: Path, columns: Columns | None) -> Reader:
    """What reads a file of this ending; one without any ending is JSONL."""
    ending = file.suffix.lower()
    if ending == ".gz" and (inner := Path(file.stem).suffix.lower()) in PACKABLE:
        ending = inner
    match ending:
        case "" | ".jsonl" | ".ndjson":
            return jsonl_rows
        case ".json":
            return json_rows
        case ".csv" | ".tsv":
            return partial(csv_rows, columns=columns, separator="," if ending == ".csv" else "\t")
        case ".parquet" | ".arrow" | ".feather":
            return partial(arrow_rows, columns=columns, parquet=ending == ".parquet")
    remedy = "Rename the file after what it holds; .gz may follow text, and a pattern in quotes takes several files."
    raise QkovError(str(file), expected=f"a file ending in {', '.join(ENDINGS)}", got=repr(file.name), remedy=remedy)
