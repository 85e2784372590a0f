"""What the command line says of the configuration's keys: their JSON Schema, and which of them a flag was meant to be.

Both follow from the keys' declarations in :mod:`qkov_dist.config`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from typing import Any

from qkov_dist.config import FEWEST_TASKS, KEYS, MOST_TASKS, SECTIONS
from qkov_dist.values import nearest

DRAFT = "https://json-schema.org/draft/2020-12/schema"
TASKS = ("tasks.0", "tasks.1")


def schema_text() -> str:
    """The JSON Schema of a configuration, as a file that editors read."""
    return json.dumps(schema(), indent=2)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration.

    It accepts what `config_file.load_config` reads, but for what depends on several keys (two tasks of one name, a
    ridge of nothing), and numbers like 8.0, which are whole in JSON and not in YAML.
    """
    sections = {name: _section(name) for name in SECTIONS if name not in TASKS}
    described = "The tasks; of two the first is A, the second B."
    tasks = {"type": "array", "description": described, "minItems": FEWEST_TASKS, "maxItems": MOST_TASKS}
    return {
        "$schema": DRAFT,
        "title": "Configuration of qkov run",
        "type": "object",
        "additionalProperties": False,
        "required": ["tasks", *(name for name, section in sections.items() if "required" in section)],
        "properties": {**sections, "tasks": {**tasks, "items": _section(TASKS[0])}},
    }


def _section(name: str) -> dict[str, Any]:
    """One section; with nothing in it, it may be left empty."""
    cls = SECTIONS[name]
    required = [entry.name for entry in fields(cls) if entry.default is MISSING]
    return {
        "type": "object" if required else ["object", "null"],
        "description": cls.__doc__,
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": {entry.name: _key(entry) for entry in fields(cls)},
    }


def _key(entry: Any) -> dict[str, Any]:
    default = {} if entry.default is MISSING else {"default": entry.default}
    return {"description": entry.metadata["meaning"], **default, **entry.metadata["kind"].schema}


def unknown_flags(unknown: Sequence[str], words: Sequence[str], flags: Collection[str], *, with_keys: bool) -> str:
    """What to say of words that no argument takes.

    Args:
        unknown: These words.
        words: The whole command line.
        flags: Those that the command has.
        with_keys: Whether it takes ``section.key=value``.
    """
    hints = [_hint(word, words, flags, with_keys=with_keys) for word in unknown if word.startswith("-")]
    return " ".join([f"no such argument: {' '.join(unknown)}.", *(hint for hint in hints if hint)])


def _hint(word: str, words: Sequence[str], flags: Collection[str], *, with_keys: bool) -> str:
    """The key or section that a flag names, or the flag or key that it nearly is; nothing where it is like none."""
    flag, equals, value = word.partition("=")
    keys = _keys_by_flag() if with_keys else {}
    spelled = flag.lstrip("-").replace("_", "-")
    near = spelled if spelled in keys else nearest(spelled, [*(known.lstrip("-") for known in flags), *keys])
    if near not in keys:
        return f"{flag}: did you mean --{near}?" if near else ""
    names = keys[near]
    if near == names[0].partition(".")[0]:
        return f"The configuration's section {near} has the keys {', '.join(names)}."
    settings = [f"{name}={value if equals else _value_after(word, words)}" for name in names]
    written = settings[0] if len(settings) == 1 else f"one of {', '.join(settings)}"
    if near != spelled:
        return f"{flag}: did you mean {written}?"
    return f"{flag} is a key of the configuration: write {written}."


def _keys_by_flag() -> dict[str, list[str]]:
    """Keys by what they might be called as flags: ``layers``, ``metric.layers``, or ``metric`` for all of it."""
    found: dict[str, list[str]] = {}
    for key in KEYS:
        for name in dict.fromkeys((key.rpartition(".")[2], key.partition(".")[0], key)):
            found.setdefault(name.replace("_", "-"), []).append(key)
    return found


def _value_after(word: str, words: Sequence[str]) -> str:
    """What stands behind a flag; ``...`` where that is no value."""
    rest = words[words.index(word) + 1 :]
    return rest[0] if rest and not rest[0].startswith("-") and rest[0].partition("=")[0] not in KEYS else "..."
