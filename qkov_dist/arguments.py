"""Checks of the arguments of public functions: one message, naming the argument."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import QkovError


def choose(name: str, value: str, options: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the options."""
    if value not in options:
        raise wrong_argument(name, f"one of {', '.join(options)}", repr(value))


def wrong_argument(name: str, expected: str, got: object) -> QkovError:
    """The error for an argument out of range."""
    return QkovError(name, expected=expected, got=str(got), remedy="Change this argument.")
