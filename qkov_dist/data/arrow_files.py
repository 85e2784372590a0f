"""Rows of Parquet and Arrow files, a few at a time and the wanted columns alone, by pyarrow.

Arrow files are mapped into memory, and what is read of them is checked first: their own offsets say where a text
begins. Texts and numbers of any encoding (dictionaries, large strings) come as Python has them; class labels by the
names that ``datasets`` writes beside a schema.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.values import readable

from .columns import Columns, check_names, without_nulls
from .rows import Budget, Content, Unread, unreadable

_BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20  # read of a column at a time
_MAPPED_BYTES = 64 << 20  # of a mapped file that stay in memory
EXTRA = 'pip install "qkov-dist[data]"'

Names = Mapping[str, Sequence[str]]  # of classes, by column


def needed_module(name: str, place: str) -> ModuleType:
    """A library of the extra ``data``; raises QkovError where it is not installed, or not whole."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        got = "no such package" if error.name in (name, package) else readable(str(error))
        remedy = f"Run '{EXTRA}', or give a JSONL, JSON, CSV or TSV file."
        raise QkovError(place, expected=f"the package {package!r}", got=got, remedy=remedy) from error


def arrow_rows(path: Path, budget: Budget, columns: Columns | None, *, parquet: bool) -> Iterator[Unread]:
    """The rows of a Parquet file, or of an Arrow file or stream.

    Raises:
        QkovError: where the file cannot be read, or lacks a column.
    """
    pa: Any = needed_module("pyarrow", str(path))
    number, kind = 0, f"a readable {'Parquet' if parquet else 'Arrow'} file"
    try:
        for batch, classes in (_parquet if parquet else _arrow)(path, columns):
            for index in range(batch.num_rows):
                number += 1
                budget.spend(batch.nbytes // batch.num_rows, path, number)
                place = f"{path}:{number}"
                yield Unread(place, number, partial(_content, batch, index, classes, place))
    except QkovError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # the last of names that are no UTF-8
        raise unreadable(f"{path}:{number + 1}" if number else str(path), kind, error) from error


def _parquet(path: Path, columns: Columns | None) -> Iterator[tuple[Any, Names]]:
    pq: Any = needed_module("pyarrow.parquet", str(path))
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        schema = file.schema_arrow
        check_names(str(path), schema.names, columns)
        wanted, classes = _wanted(schema, columns), class_names(schema.metadata)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
            yield batch, classes


def _arrow(path: Path, columns: Columns | None) -> Iterator[tuple[Any, Names]]:
    pa: Any = needed_module("pyarrow", str(path))
    if path.stat().st_size == 0:
        return  # nothing can be mapped
    with path.open("rb") as file:
        mapped, seen = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0
    reader = _reader(pa, pa.py_buffer(mapped))
    check_names(str(path), reader.schema.names, columns)
    wanted, classes = _wanted(reader.schema, columns), class_names(reader.schema.metadata)
    for batch in _batches(reader):
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.select(wanted).slice(start, _BATCH_ROWS)
            part.validate(full=True)
            yield part, classes
            seen += part.nbytes
            if seen > _MAPPED_BYTES:
                mapped.madvise(mmap.MADV_DONTNEED)  # what was read is let go; what is still wanted is read again
                seen = 0


def _reader(pa: Any, source: Any) -> Any:
    """Of an Arrow file, or of a stream, which carries no mark of its own at its start."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(source)


def _batches(reader: Any) -> Iterator[Any]:
    if not hasattr(reader, "num_record_batches"):
        yield from reader
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _wanted(schema: Any, columns: Columns | None) -> list[str]:
    return [*schema.names] if columns is None else [*columns.names]


def _content(batch: Any, index: int, classes: Names, place: str) -> Content:
    content: Content = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = without_nulls(column[index].as_py())
        except (ValueError, ArithmeticError, NotImplementedError) as error:
            got = " ".join(str(error).split())
            remedy = "Write the column anew, in UTF-8 or as numbers."
            raise QkovError(f"{place}: column {name!r}", expected="a readable value", got=got, remedy=remedy) from None
        content[name] = named_class(value, classes[name]) if name in classes else value
    return content


def class_names(metadata: Mapping[bytes, bytes] | None) -> Names:
    """Names of classes by column, where ``datasets`` wrote a file and kept them beside its schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [*map(str, feature["names"])]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def named_class(value: Any, names: Sequence[str]) -> Any:
    """A class by its name; null where it has none, as ``datasets`` marks a sample without a label by -1."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
