"""The configuration from strict YAML and from ``section.key=value`` on the command line.

Every key is known, given once, and of its kind; whatever is not so is refused at its line or its key, with the nearest
key that there is. Relative paths are taken from the current directory, as a shell takes them, not from the folder of
the YAML file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from .config import FEWEST_TASKS, MOST_TASKS, RETIRED, SECTIONS, RunConfig, TaskConfig, read_value
from .errors import QkovError
from .values import named, nearest, shown

MAX_BYTES = 256 << 10  # of YAML; as many values, once its aliases are written out
_LONGEST_KEY = 200  # that is compared with known ones
_TASK = re.compile(r"tasks\.([0-9]{1,2})(?![0-9])")
_ODD_TAGS = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError)  # such as !!bool with no bool behind


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides in order, and check every key.

    Args:
        path: The YAML file.
        overrides: Values are parsed as YAML; ``tasks.0`` or ``tasks.a`` is the first task, ``tasks.1`` or ``tasks.b``
            the second, ``tasks.2`` the third.

    Raises:
        QkovError: at ``FILE: section.key`` for a setting, at ``FILE:LINE`` for broken YAML.
    """
    raw = _parse(_read_text(Path(path)), lambda line: f"{path}:{line}")
    changed: set[str] = set()
    try:
        values = _flatten(raw)
        for override in overrides:
            key, value = _parse_override(override)
            values[key] = value
            changed.add(key)
        return _build(values)
    except QkovError as error:
        place = f"{error.where} (command line)" if error.where in changed else error.where
        raise QkovError(f"{path}: {place}", expected=error.expected, got=error.got, remedy=error.remedy) from error


def from_dict(raw: Mapping[str, Any], *, stored: bool = False) -> RunConfig:
    """Build the configuration from the nested plain values of `config.to_dict`; the same checks as `load_config`.

    Args:
        raw: Sections of keys.
        stored: Whether a file of results holds them: keys that have been given up since are then passed over.
    """
    values = _flatten(raw)
    return _build({key: value for key, value in values.items() if not (stored and key in RETIRED)})


def _flatten(raw: object) -> dict[str, object]:
    """Nested sections -> ``{"section.key": value}``, refusing shapes that are not those of `RunConfig`."""
    values: dict[str, object] = {}
    for name, body in _mapping(raw, "configuration").items():
        if name == "tasks":
            if not isinstance(body, list | tuple) or not FEWEST_TASKS <= len(body) <= MOST_TASKS:
                got = f"{len(body)} tasks" if isinstance(body, list | tuple) else shown(body)
                remedy = "Give each task a name and a path; of two the first is A."
                expected = f"a list of {FEWEST_TASKS} to {MOST_TASKS} tasks"
                raise QkovError("tasks", expected=expected, got=got, remedy=remedy)
            parts = [(f"tasks.{number}", task) for number, task in enumerate(body)]
        elif name not in SECTIONS or "." in name:
            raise _unknown(_key(name))
        else:
            parts = [(name, body)]
        for place, part in parts:
            values |= {f"{place}.{_key(key)}": value for key, value in _mapping(part, place).items()}
    return values


def _key(key: object) -> str:
    return key if isinstance(key, str) else shown(key)


def _mapping(raw: object, place: str) -> Mapping[Any, Any]:
    if raw is None and place in SECTIONS:
        return {}
    if not isinstance(raw, Mapping):
        remedy = "Write it as 'key: value' lines; see configs/ for examples."
        raise QkovError(place, expected="a mapping", got="nothing" if raw is None else shown(raw), remedy=remedy)
    return raw


def _build(values: Mapping[str, object]) -> RunConfig:
    sections = {**SECTIONS, **dict.fromkeys(_tasks_of(values), TaskConfig)}
    keys = {f"{name}.{entry.name}": entry for name, cls in sections.items() for entry in fields(cls)}
    for key, value in values.items():
        if key in RETIRED:
            raise QkovError(key, expected="no such key any more", got=shown(value), remedy=RETIRED[key])
        if key not in keys:
            raise _unknown(key)
    for key, entry in keys.items():
        if entry.default is MISSING and key not in values:
            remedy = f"Set {key}: {entry.metadata['meaning']}."
            raise QkovError(key, expected=entry.metadata["kind"].expected, got="nothing", remedy=remedy)
    read = {key: read_value(keys[key], value, key) for key, value in values.items()}
    built: dict[str, Any] = {}
    for name, cls in sections.items():
        built[name] = cls(
            **{key.rpartition(".")[2]: value for key, value in read.items() if key.startswith(f"{name}.")}
        )
    return RunConfig(tasks=tuple(built.pop(name) for name in sections if _TASK.fullmatch(name)), **built)


def _tasks_of(values: Mapping[str, object]) -> list[str]:
    """The sections of tasks beyond the second, in their order; none is left out."""
    numbers = {int(found[1]) for key in values if (found := _TASK.match(key))}
    there = range(FEWEST_TASKS, len(numbers | set(range(FEWEST_TASKS))))
    return [f"tasks.{number}" for number in there if number in numbers]


def _unknown(key: str) -> QkovError:
    """The error for an unknown key: of a misspelt section, the same key of another one, a typo, or nothing like it."""
    section, _, last = key[-_LONGEST_KEY:].rpartition(".")
    names = {name: f"{place}.{name}" for place in reversed(SECTIONS) for name in _names_of(place)}
    is_known = section in SECTIONS or (_TASK.fullmatch(section) and int(section.partition(".")[2]) < MOST_TASKS)
    near = section if is_known else nearest(section, SECTIONS)
    if near and last in _names_of(near):
        remedy = f"The nearest valid key is '{near}.{last}'."
    elif not section and (start := nearest(last, _first_words())):
        remedy = f"The nearest valid key is {start!r}."
    elif last in names:
        remedy = f"The nearest valid key is {names[last]!r}."
    elif near:
        found = nearest(last, _names_of(near))
        listed = ", ".join(f"{near}.{name}" for name in _names_of(near))
        remedy = f"The nearest valid key is '{near}.{found}'." if found else f"Valid keys are {listed}."
    else:
        remedy = f"Valid sections are {', '.join(_first_words())}; `qkov run --keys` lists their keys."
    return QkovError(named(key), expected="a known key", got=shown(last), remedy=remedy)


def _names_of(section: str) -> list[str]:
    return [entry.name for entry in fields(SECTIONS.get(section, TaskConfig))]  # tasks.7 is no section of its own


def _first_words() -> list[str]:
    return [*dict.fromkeys(name.partition(".")[0] for name in SECTIONS)]


def _parse_override(override: str) -> tuple[str, object]:
    """``tasks.a.path=x`` -> ``("tasks.0.path", "x")``."""
    key, equals, text = override.partition("=")
    if not equals or key.strip() in ("", "tasks", *SECTIONS):
        remedy = "Write for example fisher.decay=0.9 or tasks.0.path=math.jsonl, without spaces around '='."
        raise QkovError("command line", expected="section.key=value", got=shown(override), remedy=remedy)
    key = re.sub(r"^tasks\.([ab])\.", lambda match: f"tasks.{'ab'.index(match[1])}.", key.strip())
    return key, _parse(text, lambda _: f"{named(key)} (command line)")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        remedy = "Give the path of a YAML configuration; configs/ holds examples."
        raise QkovError(
            str(path), expected="a readable file", got=getattr(error, "strerror", "") or str(error), remedy=remedy
        ) from None
    if len(data) > MAX_BYTES:
        remedy = "Give the path of a YAML configuration; configs/ holds examples."
        raise QkovError(str(path), expected=f"at most {MAX_BYTES} bytes of YAML", got="more", remedy=remedy)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        remedy = "Save the file as UTF-8."
        raise QkovError(
            f"{path}:{line}", expected="UTF-8 text", got=f"byte {data[error.start]:#04x}", remedy=remedy
        ) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-8 as a number, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as written, before aliases are merged into it."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {shown(key.value)} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The document as written, refused where its aliases stand for more than any text that is read."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _num_values(node, {}) > MAX_BYTES:
            raise yaml.MarkedYAMLError(problem="aliases of aliases without end", problem_mark=node.start_mark)
        return node


def _num_values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for when its aliases are written out; infinite where one contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_num_values(part, known) for part in inner)
    return known[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, place: Callable[[int], str]) -> object:
    """One YAML document; ``place`` turns a line number into the error's place."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        got = " ".join(part for part in (error.context, error.problem) if part)
    except (yaml.YAMLError, RecursionError, *_ODD_TAGS) as error:
        line, got = 1, next(iter(str(error).splitlines()), type(error).__name__)
    remedy = "Correct this line; keys are 'key: value'."
    raise QkovError(place(line), expected="valid YAML", got=got[:_LONGEST_KEY], remedy=remedy)
