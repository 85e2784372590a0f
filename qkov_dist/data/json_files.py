"""Rows of JSONL files, one object a line, and of JSON files, which may hold an array of objects as well."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from qkov_dist.errors import QkovError
from qkov_dist.values import readable, written

from . import text_files
from .rows import Budget, Content, Unread
from .text_files import decoded, lines, opened

_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_LINES_REMEDY = "Write one JSON object a line, in UTF-8."
_ARRAY_REMEDY = "Write an array of JSON objects, or one object a line, in UTF-8."


def jsonl_rows(path: Path, budget: Budget) -> Iterator[Unread]:
    """The objects of a JSONL file; blank lines count as lines and are skipped."""
    with opened(path) as file:
        for number, line in lines(path, file, budget):
            if line.strip():
                yield Unread(f"{path}:{number}", number, partial(_object, line, path, number))


def json_rows(path: Path, budget: Budget) -> Iterator[Unread]:
    """The objects of a JSON file: of its array, or one a line."""
    with opened(path) as file:
        window = _Window(path, file, budget)
        if window.next_character() == "[":
            yield from window.objects()
            return
    yield from jsonl_rows(path, budget)


def _object(line: bytes, path: Path, number: int) -> Content:
    text, place = decoded(line, path, number, _LINES_REMEDY), f"{path}:{number}"
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}"
        raise QkovError(place, expected="one JSON object", got=got, remedy=_LINES_REMEDY) from None
    except (ValueError, RecursionError) as error:
        raise QkovError(place, expected="one JSON object", got=str(error), remedy=_LINES_REMEDY) from None
    if not isinstance(row, dict):
        raise QkovError(place, expected="one JSON object", got=type(row).__name__, remedy=_LINES_REMEDY)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> Content:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a key twice among {written([key for key, _ in pairs])}")
    return content


class _Window:
    """What is in memory of a JSON file: from the next value on, and no more than one object needs."""

    def __init__(self, path: Path, file: BinaryIO, budget: Budget) -> None:
        self._path, self._file, self._budget = path, file, budget
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
        self._text, self._at, self._line = "", 0, 1

    def next_character(self) -> str:
        """The next one that is no space; nothing at the end."""
        while True:
            self._pass_over(cast("re.Match[str]", _SPACE.match(self._text, self._at)).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def objects(self) -> Iterator[Unread]:
        """The objects of an array whose bracket is next."""
        number = 0
        self._at += 1
        while (character := self.next_character()) != "]":
            if number:
                if character != ",":
                    raise self._wrong("',' or ']' after an object", character)
                self._at += 1
                character = self.next_character()
            if character != "{":
                raise self._wrong("an object", character)
            number, line = number + 1, self._line
            self._budget.spend(0, self._path, line)
            yield Unread(f"{self._path}:{line}", number, partial(dict, self._object()))
        self._at += 1
        if character := self.next_character():
            raise self._wrong("nothing after the array", character)

    def _object(self) -> Content:
        while True:
            try:
                found, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                longest = text_files.MAX_LINE_BYTES
                if len(self._text) - self._at > longest:
                    raise self._wrong(f"an object of at most {longest} characters", f"more, or {error.msg}") from None
                if self._more():
                    continue
                self._pass_over(error.pos)
                raise self._wrong("a JSON object", error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self._wrong("a JSON object", str(error)) from None
            self._pass_over(end)
            return cast(Content, found)

    def _pass_over(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on, and let go of what lies before the next value; whether there was more."""
        data = self._file.read(_CHUNK_BYTES)
        self._budget.spend(len(data), self._path, self._line, rows=0)
        try:
            text = self._decode(data, not data)
        except UnicodeDecodeError as error:
            raise self._wrong("UTF-8 text", f"byte {error.object[error.start]:#04x}") from None
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(data)

    def _wrong(self, expected: str, got: str) -> QkovError:
        place = f"{self._path}:{self._line}"
        return QkovError(place, expected=expected, got=readable(got) or "the end of the file", remedy=_ARRAY_REMEDY)
