"""What a key of the configuration accepts: in words, as a reader of plain values, and as a JSON Schema."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from .errors import QkovError

_HIGHEST = 100_000  # above every number of a layer or head
_LONGEST_KEY = 200  # that is compared with known ones
_MOST_READABLE = 400  # characters

SAMPLE_FORMS = (
    (("text",), ()),
    (("prompt", "completion"), ("tools",)),
    (("messages",), ("tools",)),
    (("input_ids",), ("labels", "attention_mask", "token_type_ids")),
)  # keys that a sample of this form has, and keys that it may have
FORM_KEYS = tuple(dict.fromkeys(key for needed, allowed in SAMPLE_FORMS for key in (*needed, *allowed)))
SAMPLE_KEYS = (*FORM_KEYS, "id")
TEXT_KEYS = ("text", "prompt", "completion", "id")  # that a template can make


@dataclass(frozen=True)
class Kind:
    """What a key accepts, in words, and the reader that returns the value or raises ValueError.

    Attributes:
        expected: In words.
        read: Takes a plain value and returns it as the program uses it.
        schema: The same as JSON Schema, as far as that can say it; empty where values come from no configuration.
    """

    expected: str
    read: Callable[[object], Any]
    schema: Mapping[str, Any] = field(default_factory=dict)


def _require(ok: bool) -> None:
    if not ok:
        raise ValueError


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    _require(bool(value.strip()) and "\0" not in value)
    value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def whole(minimum: int) -> Kind:
    """Whole numbers from ``minimum`` that fit 64 bits; a bool is none."""

    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        _require(minimum <= value < 2**63)
        return value

    schema = {"type": "integer", "minimum": minimum, "exclusiveMaximum": 2**63}
    return Kind(f"a whole number of at least {minimum}", read, schema)


def _real(expected: str, accepts: Callable[[float], bool], **bounds: float) -> Kind:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError
        _require(math.isfinite(value) and accepts(value))
        return float(value)

    return Kind(expected, read, {"type": "number", **bounds})


def one_of(*options: str | bool) -> Kind:
    """One of a few names and flags."""

    def read(value: object) -> str | bool:
        for option in options:
            if type(option) is type(value) and option == value:  # 1 == True
                return option
        raise ValueError

    return Kind("one of " + ", ".join(str(option).lower() for option in options), read, {"enum": [*options]})


def some_of(*options: str) -> Kind:
    """A list of some of a few names, each kept once, or one of them alone."""

    def read(value: object) -> tuple[str, ...]:
        names = value if isinstance(value, list | tuple) else [value]
        _require(all(isinstance(name, str) and name in options for name in names))
        return tuple(dict.fromkeys(names))

    one = {"enum": [*options]}
    return Kind(f"a list of some of {', '.join(options)}", read, {"anyOf": [one, {"type": "array", "items": one}]})


def optional(kind: Kind) -> Kind:
    """The same kind, or null."""
    schema = {"anyOf": [kind.schema, {"type": "null"}]}
    return Kind(f"{kind.expected}, or null", lambda value: None if value is None else kind.read(value), schema)


def as_it_is(expected: str, accepts: Callable[[Any], bool]) -> Kind:
    """Values as they are, where they are accepted."""

    def read(value: object) -> Any:
        _require(accepts(value))
        return value

    return Kind(expected, read)


def _selection(value: object) -> tuple[int, ...]:
    """Sorted unique numbers from a list of numbers, one number, or text such as ``0-3,7``."""
    if isinstance(value, str):
        parts = [re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part) for part in value.split(",")]
        spans = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
        _require(len(spans) == len(parts) and all(low <= high for low, high in spans))
        _require(sum(high - low for low, high in spans) < _HIGHEST)
        return tuple(sorted({number for low, high in spans for number in range(low, high + 1)}))
    items = value if isinstance(value, list | tuple) else [value]
    numbers = {item for item in items if type(item) is int and 0 <= item < _HIGHEST}
    _require(bool(numbers) and all(type(item) is int and item in numbers for item in items))
    return tuple(sorted(numbers))


def _columns(value: object) -> dict[str, str]:
    """Names by key, in the order of keys; what the names say is no business of a kind."""
    if not isinstance(value, Mapping):
        raise ValueError
    _require(bool(value) and all(isinstance(key, str) for key in value))
    return {key: _text(value[key]) for key in value}


_NUMBER, _SPAN = {"type": "integer", "minimum": 0, "exclusiveMaximum": _HIGHEST}, r"\s*\d{1,5}\s*(-\s*\d{1,5}\s*)?"
_NUMBERS = {
    "anyOf": [
        {"type": "string", "pattern": f"^{_SPAN}(,{_SPAN})*$"},
        _NUMBER,
        {"type": "array", "items": _NUMBER, "minItems": 1},
    ]
}

TEXT = Kind("text", _text, {"type": "string", "pattern": r"\S"})
FLAG = Kind("true or false", _flag, {"type": "boolean"})
COUNT = whole(1)
NON_NEGATIVE = _real("a finite number of at least 0", lambda x: x >= 0, minimum=0)
FRACTION = _real("a number above 0 and below 1", lambda x: 0 < x < 1, exclusiveMinimum=0, exclusiveMaximum=1)
SELECTION = optional(Kind("a list of numbers from 0, or text such as '0-3,7'", _selection, _NUMBERS))

COLUMNS = optional(
    Kind(
        "names of columns by key, such as {prompt: question, completion: answer}",
        _columns,
        {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": False,
            "properties": dict.fromkeys(SAMPLE_KEYS, TEXT.schema),
        },
    )
)


def template_parts(text: str) -> list[tuple[str, str | None]] | None:
    """What a template is made of: text, and the name of the column that follows it; None for text without braces.

    Raises:
        ValueError: says what of it is no text, no doubled brace and no plain name of a column.
    """
    if "{" not in text and "}" not in text:
        return None
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in Formatter().parse(text):
        if name is not None and (not name.strip() or re.search(r"[.\[\]{}]", name) or spec or conversion):
            suffix = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"the field {written('{' + name + suffix + '}')}")
        parts.append((literal, name))
    return parts


def check_columns(columns: Mapping[str, str], place: str) -> None:
    """Raise QkovError unless the keys are those of one form of sample, and every template is made of plain names."""
    for key, name in columns.items():
        if key not in SAMPLE_KEYS:
            hint = key_hint(key, SAMPLE_KEYS)
            raise QkovError(f"{place}.{named(key)}", expected="a key of a sample", got=written(key), remedy=hint)
        try:
            parts = template_parts(name)
        except ValueError as error:
            remedy = 'Write for example "{question}\\nAnswer: {answer}"; {{ and }} stand for braces.'
            expected = "names of columns in braces, and nothing else in them"
            raise QkovError(f"{place}.{key}", expected=expected, got=str(error), remedy=remedy) from None
        if parts is not None and key not in TEXT_KEYS:
            remedy = f"A template makes text: give {key} the name of a column."
            raise QkovError(f"{place}.{key}", expected="the name of a column", got=written(name), remedy=remedy)
    if form_of(columns) is None:
        expected = "the keys of one form: text; prompt and completion; messages; input_ids (and labels)"
        remedy = "Name the columns of one form and leave the others out."
        raise QkovError(place, expected=expected, got=", ".join(columns), remedy=remedy)


def form_of(keys: Collection[str]) -> tuple[str, ...] | None:
    """What a sample of the keys' form has to have; None where they are of no form, or of several."""
    given = {key for key in keys if key != "id"}
    forms = ((needed, {*needed, *allowed}) for needed, allowed in SAMPLE_FORMS)
    return next((needed for needed, known in forms if given & {*needed} and given <= known), None)


def shown(value: object) -> str:
    """A value as the YAML would show it, cut to one short piece."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else written(value)


def readable(text: str) -> str:
    """Text from outside as one short line: what cannot be printed is escaped, the end cut off."""
    line = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return line if len(line) <= _MOST_READABLE else f"{line[: _MOST_READABLE - 3]}..."


def written(value: object) -> str:
    """A value as Python writes it, cut to one short piece."""
    try:
        text = " ".join(repr(value).splitlines())  # of an array it has several
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a nest as deep as the stack
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(key: str, known: Collection[str]) -> str | None:
    """The known key that a mistyped one was meant to be; None where none is near."""
    return next(iter(difflib.get_close_matches(key[:_LONGEST_KEY], known, n=1)), None)


def key_hint(key: str, known: Collection[str]) -> str:
    """What to write in place of an unknown key: the one that it was meant to be, or one of all that there are."""
    near = nearest(key, known)
    return f"The nearest valid key is {near!r}." if near else f"Valid keys are {', '.join(known)}."


def named(key: str) -> str:
    """A key as it stands where it can be read on one line, and quoted, escaped and cut otherwise."""
    return key if key.isprintable() and len(key) <= 80 else written(key)
