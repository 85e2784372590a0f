"""Lines of a text file, packed by gzip or not: in UTF-8, none too long, from the start and no more than asked for."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from qkov_dist.errors import QkovError

from .rows import Budget, unreadable

MAX_LINE_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, EOFError, zlib.error)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked; what the system says of it becomes one message."""
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except _READ_ERRORS as error:
        raise unreadable(str(path), _kind(path), error) from error


def lines(path: Path, file: BinaryIO, budget: Budget) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, without a byte order mark.

    Raises:
        QkovError: for a line that is too long, and where the file cannot be read on.
    """
    number = 0
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            budget.spend(len(line), path, number)
            if len(line) > MAX_LINE_BYTES:
                expected, remedy = f"at most {MAX_LINE_BYTES} bytes a line", "Cut this line, or leave it out."
                raise QkovError(f"{path}:{number}", expected=expected, got="a longer line", remedy=remedy)
            yield number, line.removeprefix(_BOM) if number == 1 else line
    except _READ_ERRORS as error:
        place = f"{path}:{number + 1}" if number else str(path)
        raise unreadable(place, _kind(path), error) from error


def decoded(line: bytes, path: Path, number: int, remedy: str) -> str:
    """A line as text; raises QkovError at the byte that is none."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        got = f"byte {line[error.start]:#04x} at byte {error.start} of the line"
        raise QkovError(f"{path}:{number}", expected="UTF-8 text", got=got, remedy=remedy) from None


def _kind(path: Path) -> str:
    return "a readable gzip file" if path.suffix == ".gz" else "a readable file"
