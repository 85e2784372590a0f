"""Extensions that are compiled when they are first used, and the lock that a build leaves where it is killed.

Torch has one process build an extension and the others wait until its lock is gone; one that was killed never takes it
away. DeepSpeed builds so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.file_baton import FileBaton

from qkov_dist.errors import QkovError


@contextmanager
def locks_end(timeout_s: float) -> Iterator[None]:
    """Refuse to wait longer than this for an extension that another process builds.

    Raises:
        QkovError: from within, where a lock is older; names it.
    """

    def wait(self: FileBaton) -> None:
        path, start = Path(self.lock_file_path), time.time()
        while (begun := _begun(path)) is not None:
            if (seconds := time.time() - min(begun, start)) > timeout_s:
                raise QkovError(
                    str(path),
                    expected="the lock of an extension's build to go when the build ends",
                    got=f"one that is {seconds:.0f} s old",
                    remedy="Remove it if no process is building: it is what a killed build leaves. If one is, set "
                    "QKOV_TIMEOUT_S to more seconds.",
                )
            time.sleep(self.wait_seconds)

    before = FileBaton.wait
    FileBaton.wait = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileBaton.wait = before  # type: ignore[method-assign]


def _begun(path: Path) -> float | None:
    """When a lock was made, seconds since 1970; None where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
