"""The configuration from strict YAML and from ``section.key=value`` on the command line.

Every key is known, given once, and of its kind; whatever is not so is refused at its line or its key, with the nearest
key that there is. Relative paths are taken from the current directory, as a shell takes them, not from the folder of
the YAML file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from .config import KEYS, SECTIONS, RunConfig, read_value
from .errors import QkovError
from .kinds import shown


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides in order, and check every key.

    Args:
        path: The YAML file.
        overrides: Values are parsed as YAML; ``tasks.0`` or ``tasks.a`` is the first task, ``tasks.1`` or ``tasks.b``
            the second.

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


def from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """Build the configuration from the nested plain values of `config.to_dict`; the same checks as `load_config`."""
    return _build(_flatten(raw))


def _flatten(raw: object) -> dict[str, object]:
    """Nested sections -> ``{"section.key": value}``, refusing shapes that are not those of `RunConfig`."""
    values: dict[str, object] = {}
    for name, body in _mapping(raw, "configuration").items():
        if name == "tasks":
            if not isinstance(body, list | tuple) or len(body) != 2:
                got = f"{len(body)} tasks" if isinstance(body, list | tuple) else shown(body)
                remedy = "Give task A first, then B, each with a name and a path."
                raise QkovError("tasks", expected="a list of exactly two tasks", got=got, remedy=remedy)
            parts = [("tasks.0", body[0]), ("tasks.1", body[1])]
        elif name not in SECTIONS:
            raise _unknown(str(name))
        else:
            parts = [(name, body)]
        for place, part in parts:
            values |= {f"{place}.{key}": value for key, value in _mapping(part, place).items()}
    return values


def _mapping(raw: object, place: str) -> Mapping[Any, Any]:
    if raw is None and place in SECTIONS:
        return {}
    if not isinstance(raw, Mapping):
        remedy = "Write it as 'key: value' lines; see configs/ for examples."
        raise QkovError(place, expected="a mapping", got="nothing" if raw is None else shown(raw), remedy=remedy)
    return raw


def _build(values: Mapping[str, object]) -> RunConfig:
    for key in values:
        if key not in KEYS:
            raise _unknown(key)
    for key, entry in KEYS.items():
        if entry.default is MISSING and key not in values:
            remedy = f"Set {key}: {entry.metadata['meaning']}."
            raise QkovError(key, expected=entry.metadata["kind"].expected, got="nothing", remedy=remedy)
    read = {key: read_value(KEYS[key], value, key) for key, value in values.items()}
    built: dict[str, Any] = {}
    for name, cls in SECTIONS.items():
        built[name] = cls(
            **{key.rpartition(".")[2]: value for key, value in read.items() if key.startswith(f"{name}.")}
        )
    return RunConfig(tasks=(built.pop("tasks.0"), built.pop("tasks.1")), **built)


def _unknown(key: str) -> QkovError:
    """The error for an unknown key, naming the nearest: of a misspelt section, the same key elsewhere, or a typo."""
    section, _, last = key.rpartition(".")
    elsewhere = {known.rpartition(".")[2]: known for known in reversed(KEYS)}.get(last)
    sections = [*dict.fromkeys(name.partition(".")[0] for name in SECTIONS)]
    if section and section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0)[0]
        nearest = f"{near}.{last}" if f"{near}.{last}" in KEYS else near
    else:
        nearest = elsewhere or difflib.get_close_matches(key, KEYS if section else sections, n=1, cutoff=0)[0]
    return QkovError(key, expected="a known key", got=repr(last), remedy=f"The nearest valid key is {nearest!r}.")


def _parse_override(override: str) -> tuple[str, object]:
    """``tasks.a.path=x`` -> ``("tasks.0.path", "x")``."""
    key, equals, text = override.partition("=")
    if not equals or key.strip() in ("", "tasks", *SECTIONS):
        remedy = "Write for example fisher.decay=0.9 or tasks.0.path=math.jsonl, without spaces around '='."
        raise QkovError("command line", expected="section.key=value", got=repr(override), remedy=remedy)
    key = re.sub(r"^tasks\.([ab])\.", lambda match: f"tasks.{'ab'.index(match[1])}.", key.strip())
    return key, _parse(text, lambda _: f"{key} (command line)")


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        remedy = "Give the path of a YAML configuration; configs/ holds examples."
        raise QkovError(
            str(path), expected="a readable file", got=error.strerror or str(error), remedy=remedy
        ) from None
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
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line, got = 1, str(error).splitlines()[0]
    raise QkovError(place(line), expected="valid YAML", got=got, remedy="Correct this line; keys are 'key: value'.")
