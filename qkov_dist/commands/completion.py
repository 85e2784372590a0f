"""Completion in the shell, by argcomplete: commands, options, files, and the configuration's keys and their choices.

The shell runs ``qkov`` itself at every press of TAB, with ``_ARGCOMPLETE`` in its environment, and reads the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, cast

from argcomplete import autocomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter
from argcomplete.shell_integration import shellcode

from qkov_dist.config import KEYS
from qkov_dist.values import shown

from .parser import CommandParser, Parser

SETTING = "section.key=value"
COMPLETERS = {  # by what an argument is called in the help
    "CONFIG.yaml": FilesCompleter(("yaml", "yml")),
    "DIR": DirectoriesCompleter(),
    "MODEL": FilesCompleter(),
    "FILE": FilesCompleter(),
    "FILE.json": FilesCompleter(("json",)),
}


def shell_code(shell: str) -> str:
    """What a shell evaluates to complete ``qkov``."""
    code: str = shellcode(["qkov"], shell=shell)
    return code


def complete(parser: Parser, commands: Iterable[CommandParser]) -> None:
    """Answer the shell that asks for completions, and end the process."""
    for command in commands:
        command.load()
        for action in command.arguments:
            _choose(action)
    autocomplete(parser, always_complete_options=False)


def _choose(action: argparse.Action) -> None:
    """Say how an argument's value is completed; argparse has no place for that, argcomplete reads an attribute."""
    if action.metavar == SETTING:
        cast(Any, action).completer = settings
    elif isinstance(action.metavar, str) and action.metavar in COMPLETERS:
        cast(Any, action).completer = COMPLETERS[action.metavar]


def settings(prefix: str, **_: object) -> list[str]:
    """Keys with ``=`` behind them, and the choices of one that is written out; where it has none, the shell's files."""
    key, equals, _text = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in KEYS]
    if key not in KEYS:
        return []
    return [f"{key}={value}" for value in _values(key)]


def _values(key: str) -> list[str]:
    """What an enumerated key accepts."""
    schema = KEYS[key].metadata["kind"].schema
    if schema.get("type") == "boolean":
        return ["true", "false"]
    return [value if isinstance(value, str) else shown(value) for value in schema.get("enum", ())]
