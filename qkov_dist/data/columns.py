"""What a source calls the keys of a sample: names of columns, or templates that make text of several.

A column that is missing, is null where a sample needs it, or is no text where text is needed, is refused at its row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.values import SAMPLE_FORMS, SAMPLE_KEYS, TEXT_KEYS, form_of, named, nearest, template_parts, written

from .rows import Content

_MOST_NAMES = 40  # of columns, in a message
LIST_KEYS = tuple(key for key in SAMPLE_KEYS if key not in TEXT_KEYS)

Template = list[tuple[str, str | None]]  # text, and the column that follows it


@dataclass(frozen=True)
class Columns:
    """Which columns make a sample.

    Attributes:
        sources: By key of a sample, a column's name or a template.
        needed: The keys that every sample has to have.
    """

    sources: Mapping[str, str | Template]
    needed: frozenset[str]

    @classmethod
    def of(cls, named_columns: Mapping[str, str]) -> Columns:
        """Of checked names; a key that the form needs and that is not named is called as it is."""
        needed = form_of(named_columns) or ()
        names = {key: key for key in needed} | dict(named_columns)
        return cls({key: template_parts(name) or name for key, name in names.items()}, frozenset((*needed, "id")))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are read, each once."""
        found: dict[str, None] = {}
        for source in self.sources.values():
            names = [source] if isinstance(source, str) else [name for _, name in source if name is not None]
            found |= dict.fromkeys(names)
        return tuple(found)

    def sample(self, content: Content, place: str) -> Content:
        """The keys of a sample, of what a row holds.

        Raises:
            QkovError: at the row's place, naming key and column.
        """
        for name in self.names:
            if name not in content:
                raise no_column(place, name, content)
        found = {key: self._value(key, source, content, place) for key, source in self.sources.items()}
        return {key: value for key, value in found.items() if value is not None}

    def _value(self, key: str, source: str | Template, content: Content, place: str) -> Any:
        if not isinstance(source, str):
            return "".join(text + _as_text(name, content, f"{place}: {key}") for text, name in source)
        value, where = content[source], f"{place}: {key} (column {source!r})"
        if value is None and key in self.needed:
            raise _null(where)
        if key in ("text", "prompt", "completion") and not isinstance(value, str):
            _refuse_no_text(key, source, value, where)
        return value


def _as_text(name: str | None, content: Content, place: str) -> str:
    """What a template shows of a column: text as it is, numbers as Python writes them."""
    if name is None:
        return ""
    value, where = content[name], f"{place} (column {name!r})"
    if isinstance(value, str):
        return value
    if value is None:
        raise _null(where)
    if not isinstance(value, bool | int | float | Decimal) or not math.isfinite(value):
        remedy = "A template takes columns of text and numbers; leave this one out."
        raise QkovError(where, expected="text or a number", got=_kind(value), remedy=remedy)
    return str(value)


def _refuse_no_text(key: str, source: str, value: Any, where: str) -> None:
    if isinstance(value, list) and key != "text":
        return  # messages
    if isinstance(value, bool | int | float | Decimal):
        remedy = f'To write it as text, make it a template: {key}: "{{{source}}}".'
    else:
        remedy = f"Name a column of text for {key}" + ("; of messages for messages." if key == "text" else ".")
    raise QkovError(where, expected="text", got=_kind(value), remedy=remedy)


def _null(where: str) -> QkovError:
    return QkovError(where, expected="a value", got="null", remedy="Fill it in, or leave this row out.")


def _kind(value: object) -> str:
    return f"{written(value)} ({type(value).__name__})"


def lists_of_text(content: Content) -> Content:
    """The same with lists in place of their JSON text, which is how CSV holds messages, tools and token ids."""
    return {key: _list_of(value) if key in LIST_KEYS else value for key, value in content.items()}


def _list_of(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) else value


def without_nulls(value: Any) -> Any:
    """Nested objects less the keys that are null: a table gives every row the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(part) for part in value]
    return value


def check_names(place: str, found: Sequence[str], columns: Columns | None) -> None:
    """Raise QkovError unless a table has each wanted column once; where none are named, a sample's keys alone."""
    if columns is None and set(found) - {*SAMPLE_KEYS}:
        raise QkovError(
            place,
            expected="columns called like the keys of a sample, or the task's columns to say which is which",
            got=_listed(found),
            remedy=f"Set for example {_example(found)}.",
        )
    for name in found if columns is None else columns.names:
        if name not in found:
            raise no_column(place, name, found)
        if found.count(name) > 1:
            got = f"{found.count(name)} of this name"
            raise QkovError(place, expected=f"one column {name!r}", got=got, remedy="Rename all but one of them.")


def no_column(place: str, name: str, found: Iterable[str]) -> QkovError:
    """The error for a column that is not there."""
    names = [*found]
    near = nearest(name, names)
    hint = f"Did you mean {near!r}? " if near else ""
    there = f"The columns are {_listed(names)}." if names else "There are no columns."
    return QkovError(place, expected=f"a column {name!r}", got="no such column", remedy=f"{hint}{there}")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(named, names[:_MOST_NAMES])) + more


def _example(found: Sequence[str]) -> str:
    """``columns`` as they might be meant, of a table's own names."""
    whole = next((needed for needed, _ in SAMPLE_FORMS if {*needed} <= {*found}), ())
    keys = whole or (("text",) if len(found) == 1 else ("prompt", "completion"))
    names = whole or [name for name in found if name != "id"] or found
    pairs = ", ".join(f"{key}: {named(name)}" for key, name in zip(keys, names, strict=False))
    return f"columns: {{{pairs}}}"
