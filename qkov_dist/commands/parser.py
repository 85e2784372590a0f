"""argparse with the project's manners: errors on one line, the nearest right word, commands loaded when chosen."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import Any, NoReturn

from qkov_dist.values import nearest


class Parser(argparse.ArgumentParser):
    """Errors in the project's own form, with the word that a mistyped one was meant to be."""

    @property
    def flags(self) -> Collection[str]:
        """Options as they are written, such as ``--quiet``."""
        return self._option_string_actions.keys()

    @property
    def arguments(self) -> Sequence[argparse.Action]:
        """All arguments and options."""
        return self._actions

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, on one line, and end with exit code 2."""
        end = "" if message.endswith((".", "?")) else "."
        print(f"{self.prog}: {message}{end} See `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Overrides argparse's, which lists the choices and leaves the reader to find the right one."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = nearest(str(value), choices)
        question = f". Did you mean {near!r}?" if near else ""
        raise argparse.ArgumentError(action, f"expected one of {', '.join(choices)}, got {value!r}{question}")


class CommandParser(Parser):
    """The parser of one command, whose module is loaded when the command is chosen: others cost nothing.

    The module has ``EXAMPLE``, a command line; ``add_arguments(parser)``; and ``execute(options)``.

    Attributes:
        module: Name of the command's module.
    """

    module = ""

    def load(self) -> None:
        """Take the arguments from the command's module, once."""
        if not self.module:
            return
        command, self.module = import_module(self.module), ""
        self.epilog = f"example: {command.EXAMPLE}"
        self.set_defaults(execute=command.execute)
        self.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
        self.add_argument("--quiet", action="store_true", help="show no progress bars")
        command.add_arguments(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, once the command is loaded."""
        self.load()
        return super().parse_known_args(args, namespace)
