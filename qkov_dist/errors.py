"""The one error that a user can cause.

Every message answers four questions: where it happened, what was expected, what was found, and what to do about it.
The command line prints it without a traceback and exits with code 2.
"""

from __future__ import annotations


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
