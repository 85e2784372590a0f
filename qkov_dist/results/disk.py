"""What the file system refuses, as the user's error: which file it is, what was needed, what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qkov_dist.errors import QkovError
from qkov_dist.values import readable

_NO_ROOM, _FORBIDDEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, {errno.EACCES, errno.EPERM, errno.EROFS}
_REASONS = (
    (_NO_ROOM, "room on the disk", "Free space or choose another folder."),
    (_FORBIDDEN, "permission to use this file", "Change it or choose another folder."),
    ({errno.ENOENT, errno.ENOTDIR}, "an existing file in an existing folder", "Check the path."),
    ({errno.EISDIR, errno.EEXIST}, "a file where a file belongs, and a folder where a folder does", "Check the path."),
    ({errno.ENAMETOOLONG, errno.ELOOP}, "a path that the file system takes", "Check the path."),
    ({errno.EAGAIN, errno.EWOULDBLOCK}, "a file that no other process is writing", ""),
)
_LOCKED = (
    "Close the other process; where the file system itself has no locks, set HDF5_USE_FILE_LOCKING=FALSE in the "
    "environment."
)
DAMAGED = "The file is damaged or is not of qkov_dist: move it away and write it again."


@contextmanager
def file_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the given errors of a block into one QkovError that names the file and what to set."""
    try:
        yield
    except QkovError:
        raise
    except kinds as error:
        raise _explained(path, error) from error


@contextmanager
def disk_errors() -> Iterator[None]:
    """The same for a block of any kind: only errors that the file system gave, with the file that it names."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None and error.errno not in _NO_ROOM | _FORBIDDEN:
            raise  # of a connection, a process, a clock
        raise _explained(Path(str(error.filename or "output")), error) from error


def _explained(path: Path, error: Exception) -> QkovError:
    text = readable(" ".join(str(error).split())) or type(error).__name__
    found = next((r for r in _REASONS if getattr(error, "errno", None) in r[0]), None)
    expected, remedy = (found[1], found[2]) if found else ("an intact file", DAMAGED)
    if "lock file" in text or not remedy:
        expected, remedy = "a file that no other process is writing", _LOCKED
    return QkovError(str(path), expected=expected, got=text, remedy=remedy)
