"""The one error that a user can cause.

Every message answers four questions: where it happened, what was expected, what was found, and what to do about it.
The command line prints it without a traceback and exits with code 2. An argument of a public function that is out of
range is refused by the same message, naming the argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral


class QkovError(ValueError):
    """A problem with the user's input, model, files or settings.

    Attributes:
        exit_code: Of the command line.

    Args:
        where: The file, setting, parameter, sample or layer at fault.
        expected: What would have been right.
        got: What was found instead.
        remedy: What the user can do about it.
    """

    exit_code = 2

    def __init__(self, where: str, *, expected: str, got: str, remedy: str) -> None:
        self.where, self.expected, self.got, self.remedy = where, expected, got, remedy
        super().__init__(f"{where}: expected {expected}, got {got}. {remedy}")

    @property
    def parts(self) -> dict[str, str]:
        """The arguments that make this error again, as JSON."""
        return {"where": self.where, "expected": self.expected, "got": self.got, "remedy": self.remedy}

    def within(self, outer: str) -> QkovError:
        """Return the same error with an outer place put before its own (``outer: where: ...``)."""
        return QkovError(f"{outer}: {self.where}", expected=self.expected, got=self.got, remedy=self.remedy)


def choose(name: str, value: str, options: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the options."""
    if value not in options:
        raise wrong_argument(name, f"one of {', '.join(options)}", repr(value))


def wrong_argument(name: str, expected: str, got: object) -> QkovError:
    """The error for an argument out of range."""
    return QkovError(name, expected=expected, got=str(got), remedy="Change this argument.")


SIGNS = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket")


def is_broken_call(error: RuntimeError) -> bool:
    """Whether a call failed because of another rank, by its type or text."""
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or any(sign in text for sign in SIGNS)


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number, of any library, of at least ``least``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def ascending(name: str, numbers: Iterable[int] | None) -> tuple[int, ...] | None:
    """An argument of numbers, each above the one before; None where there is none."""
    if numbers is None:
        return None
    chosen = tuple(numbers) if isinstance(numbers, Iterable) else (numbers,)
    if not chosen or not all(is_whole(n, 0) for n in chosen) or any(a >= b for a, b in pairwise(chosen)):
        raise wrong_argument(name, "ascending whole numbers from 0, each once", list(chosen))
    return tuple(map(int, chosen))
