"""Where a task's rows come from: a JSONL file, built-in text, or a dataset of the hub.

A row is one JSON object with its place (``FILE:LINE``) and its number; what it may hold is no business of this module.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qkov_dist.config import TaskConfig
from qkov_dist.errors import QkovError
from qkov_dist.values import named, written

from .builtin import builtin_samples

MAX_LINE_BYTES = 4 << 20
MAX_LINES, MAX_FILE_BYTES = 100_000, 64 << 20  # read of a file before ``max_samples`` stops it; unpacked, where packed


Row = tuple[str, int, dict[str, Any]]  # place, number from 1, content


def rows(config: TaskConfig) -> Iterator[Row]:
    """The rows of a task's path, one after another.

    Raises:
        QkovError: where the source cannot be read, or a row is no JSON object.
    """
    if config.path.startswith("builtin:"):
        for number, content in enumerate(builtin_samples(config.path, config.max_samples), 1):
            yield f"{config.path}:{number}", number, content
    elif config.path.startswith("hf:"):
        yield from _dataset_rows(config.path)
    else:
        yield from _file_rows(Path(config.path))


def _file_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file; blank lines count as lines and are skipped."""
    number = num_bytes = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number, num_bytes = number + 1, num_bytes + len(line)
                if number > MAX_LINES or num_bytes > MAX_FILE_BYTES:
                    raise _too_long(f"{path}:{number}")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", number, _object(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        place = f"{path}:{number + 1}" if number else str(path)
        kind = "a readable gzip file" if path.suffix == ".gz" else "a readable file"
        got = getattr(error, "strerror", None) or str(error)
        remedy = f"Check the path and the file's contents; it is taken from {Path.cwd()}."
        raise QkovError(place, expected=kind, got=got, remedy=remedy) from error


def _too_long(place: str) -> QkovError:
    expected = f"at most {MAX_LINES} lines and {MAX_FILE_BYTES >> 20} MiB"
    remedy = "Set max_samples of this task to read the first samples alone, or shorten the file."
    return QkovError(place, expected=expected, got="more", remedy=remedy)


def _object(line: bytes, place: str) -> dict[str, Any]:
    remedy = "Write one JSON object a line, in UTF-8."
    if len(line) > MAX_LINE_BYTES:
        raise QkovError(place, expected=f"at most {MAX_LINE_BYTES} bytes a line", got="a longer line", remedy=remedy)
    try:
        row = json.loads(line.decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        got = f"byte {line[error.start]:#04x} at byte {error.start} of the line"
        raise QkovError(place, expected="UTF-8 text", got=got, remedy=remedy) from None
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
        raise QkovError(place, expected="one JSON object", got=got, remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise QkovError(place, expected="one JSON object", got=str(error), remedy=remedy) from None
    if not isinstance(row, dict):
        raise QkovError(place, expected="one JSON object", got=type(row).__name__, remedy=remedy)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a key twice among {written([key for key, _ in pairs])}")
    return content


def _dataset_rows(path: str) -> Iterator[Row]:
    """Rows of ``hf:HUB_ID[:CONFIG][:SPLIT]#COLUMN``; a lone part is a config where the dataset has one of that name."""
    source, _, column = path.removeprefix("hf:").partition("#")
    hub_id, *parts = re.split(r":(?![^\[]*\])", source)
    if not hub_id or not column or len(parts) > 2:
        remedy = "Write for example hf:org/dataset:main:train#text."
        raise QkovError(path, expected="hf:HUB_ID[:CONFIG][:SPLIT]#COLUMN", got=repr(path), remedy=remedy)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        remedy = "Run 'pip install datasets', or give a JSONL file."
        raise QkovError(path, expected="the package 'datasets'", got="no such package", remedy=remedy) from None
    try:
        lone_config = len(parts) == 1 and parts[0] in datasets.get_dataset_config_names(hub_id)
        name = parts[0] if len(parts) == 2 or lone_config else None
        split = parts[-1] if parts and not lone_config else "train"
        rows = datasets.load_dataset(hub_id, name or None, split=split, streaming="[" not in split)
        for number, row in enumerate(rows, 1):
            yield f"{path}:{number}", number, _dataset_row(row, column, f"{path}:{number}")
    except QkovError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        remedy = "Check the dataset's id, config and split, and the network."
        raise QkovError(path, expected="a readable dataset", got=str(error), remedy=remedy) from error


def _dataset_row(row: dict[str, Any], column: str, place: str) -> dict[str, Any]:
    if column not in row:
        remedy = f"The columns are {', '.join(map(named, row))}."
        raise QkovError(place, expected=f"a column {column!r}", got="no such column", remedy=remedy)
    value = row[column]
    if not isinstance(value, list):
        return {"text": value}
    if not value or not isinstance(value[0], dict):
        return {"input_ids": value}
    tools = {"tools": _without_nulls(row["tools"])} if row.get("tools") else {}
    return {"messages": _without_nulls(value), **tools}


def _without_nulls(value: Any) -> Any:
    """Nested objects less the keys that are null: a table gives every row the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
