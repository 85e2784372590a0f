"""Records of CSV and TSV files. Every value is text, as it is written: "042", "NA" and "null" are answers like others.

A record has as many values as the header: text with a separator in it and no quotes around it would otherwise move into
the columns beside its own.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from qkov_dist.errors import QkovError
from qkov_dist.values import readable

from . import text_files
from .columns import Columns, check_names
from .rows import Budget, Content, Unread
from .text_files import decoded, lines, opened


def csv_rows(path: Path, budget: Budget, columns: Columns | None, *, separator: str) -> Iterator[Unread]:
    """The records below the first, which names the columns; blank lines are skipped."""
    names: list[str] | None = None
    number = 0
    for line, record in _records(path, budget, separator):
        place = f"{path}:{line}"
        if names is None:
            names = record
            check_names(place, names, columns)
            continue
        number += 1
        yield Unread(place, number, partial(_content, names, record, place))


def _records(path: Path, budget: Budget, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it begins at."""
    remedy = "Save the file as UTF-8."
    with opened(path) as file:
        texts = (decoded(line, path, number, remedy) for number, line in lines(path, file, budget))
        reader = csv.reader(texts, delimiter=separator, strict=True)
        while True:
            line = reader.line_num + 1
            before = csv.field_size_limit(text_files.MAX_LINE_BYTES)  # of all readers: for one record alone
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                remedy = 'Put text with quotes or line ends in it between double quotes, and write "" for a quote.'
                got = readable(str(error))
                raise QkovError(f"{path}:{line}", expected="a record", got=got, remedy=remedy) from None
            finally:
                csv.field_size_limit(before)
            if record:
                yield line, record


def _content(names: list[str], record: list[str], place: str) -> Content:
    if len(record) != len(names):
        raise QkovError(
            place,
            expected=f"{len(names)} values, as many as the first line has",
            got=f"{len(record)}",
            remedy="Put text with the separator in it between double quotes.",
        )
    return dict(zip(names, record, strict=True))
