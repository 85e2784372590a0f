"""Readers with every fault that the harness must see, and two without."""

from __future__ import annotations

import os
import time
from pathlib import Path

from watchdog import HEADROOM

from qkov_dist.errors import QkovError


def _refuses(got: str) -> QkovError:
    return QkovError("file", expected="a good one", got=got, remedy="Write it again.")


def good(folder: Path) -> None:
    """Reads, and changes nothing for the inputs that follow."""
    assert (folder / "file").read_bytes() == b"content"


def refuses(_: Path) -> None:
    """One clear error."""
    raise _refuses("a bad one")


def says_too_much(_: Path) -> None:
    """An error that nobody reads to its end."""
    raise _refuses("x" * 100_000)


def says_it_on_two_lines(_: Path) -> None:
    """An error that looks like two."""
    raise _refuses("a\nb")


def raises(_: Path) -> None:
    """An error that nobody explained."""
    raise KeyError("layers")


def exits(_: Path) -> None:
    """Ends the process as if all were well."""
    raise SystemExit(0)


def eats(_: Path) -> None:
    """More memory than there is for it."""
    bytearray(2 * HEADROOM)


def nibbles(_: Path) -> None:
    """The same in small pieces."""
    kept = []
    while True:
        kept.append(bytearray(1 << 20))


def computes(_: Path) -> None:
    """Never ends, and is busy."""
    while True:
        pass


def waits(_: Path) -> None:
    """Never ends, and is not."""
    time.sleep(10_000)


def crashes(_: Path) -> None:
    """Takes the interpreter along."""
    os.abort()


READERS = {
    reader.__name__: reader
    for reader in (
        *(good, refuses, says_too_much, says_it_on_two_lines, raises),
        *(exits, eats, nibbles, computes, waits, crashes),
    )
}
