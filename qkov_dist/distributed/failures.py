"""What the other ranks learn when one fails: which, and why; and that none of them waits for ever.

A rank that fails leaves a note (:mod:`qkov_dist.distributed.failure_notes`), then closes its connections. The calls of
the others break on that, and they read the note: a *cause* is a rank's own error, a *symptom* a call that broke because
of another rank. Where no cause turns up, the ranks without any note are those that died or hang; the first rank to find
out leaves that too, so that all name the same. A rank whose process holds the store stays until the others have read
it.

Some backends (NCCL) do not notice that a peer is gone, and a rank may be far from its next call: a thread looks for
notes too, answers that its rank is alive, and ends a process that does not end by itself. What it says then reaches the
stderr of before, wherever a library has put it meanwhile: DeepSpeed hides it in a file while it tries a compiler.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from qkov_dist.errors import QkovError, is_broken_call

from .failure_notes import ROOT, Cause, Notes

GRACE_S = 5.0  # for a note to turn up
LINGER_S = 10.0  # for others to read the store of a process that ends, and for a process to end by itself
STDERR = 2  # the descriptor
NAME = "qkov-failures"  # of the thread
POLL_S, LOOK_S = 0.05, 0.5  # between two looks at the notes, of a rank that waits for one and of one that is at work


class Watch:
    """Looks after one process group, on one rank.

    Args:
        store: The key-value store of the process group.
        rank: This rank.
        ranks: All ranks of the group, by their numbers among all.
        root: Where notes are left.
        store_is_of_rank_0: Whether the store lives in rank 0's process, and not in the launcher's.
        ends_process: Whether to end this process where it does not end by itself.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: Sequence[int],
        root: str = ROOT,
        *,
        store_is_of_rank_0: bool = False,
        ends_process: bool = False,
    ) -> None:
        self._notes = Notes(store, rank, ranks, root)
        self._store_is_of_rank_0, self._ends_process = store_is_of_rank_0, ends_process
        self._error: BaseException | None = None
        self._found: Cause | tuple[int, ...] | None = None  # whose fault it is: by its own error, or lost ranks
        self._closed = threading.Event()
        self._looking: threading.Thread | None = None

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """Leave a note when this rank fails; when another did, raise an error that names it."""
        try:
            if self._ends_process:
                arguments = (self._notes.clone(), _copy_of_stderr())
                self._looking = threading.Thread(target=self._look_out, args=arguments, name=NAME, daemon=True)
                self._looking.start()
            yield
        except BaseException as error:
            self._error = error
            if isinstance(error, RuntimeError) and is_broken_call(error):
                raise self._explained(error) from error
            self.leave_note(error)
            raise

    def close(self) -> None:
        """Take leave, once the connections are closed: whoever holds the store waits until the others have read it.

        The thread is waited for: where Python ends while it is in a call of the store, the process is aborted.
        """
        if self._error and self._store_is_of_rank_0 and self._notes.rank == 0:
            lost = self._found if isinstance(self._found, tuple) else ()
            alive = self._notes.alive(lost)
            staying = [rank for rank in self._notes.ranks if rank and (rank not in lost or rank in alive)]
            _until(lambda: self._notes.read_by(staying), LINGER_S)
        self._closed.set()
        if self._looking is not None:
            self._looking.join(GRACE_S)

    def _explained(self, error: RuntimeError) -> QkovError:
        """The error that says whose fault a broken call is."""
        try:
            self._notes.leave_symptom()
            _until(lambda: self._look(self._notes), GRACE_S)
            if self._found is None:
                self._found = self._notes.leave_lost(self._missing())
            self._notes.leave_read()
        except RuntimeError:
            pass  # whoever holds the store is gone; what was found before still holds
        return self._message(self._found, error)

    def _missing(self) -> tuple[int, ...]:
        """The ranks that left no note: those that are dead, or if all answer, those that hang."""
        silent = self._notes.silent()
        alive = self._notes.alive(silent)
        return tuple(rank for rank in silent if rank not in alive) or silent

    def _message(self, found: Cause | tuple[int, ...] | None, error: BaseException) -> QkovError:
        """Whose fault it is; where nothing was found, it is who holds the store."""
        rank, reason = self._notes.rank, _in_short(error)
        if isinstance(found, Cause):
            return failed(found.rank, found.message)
        if found is None:
            return _no_answer("rank 0" if self._store_is_of_rank_0 else "the launcher", rank, reason)
        if others := [str(lost) for lost in found if lost != rank]:
            return _no_answer(f"rank {', '.join(others)}", rank, reason)
        return QkovError(
            f"rank {rank}",
            expected="to answer in time",
            got=f"other ranks that gave up waiting ({reason})",
            remedy="Find out what kept it, or set QKOV_TIMEOUT_S to more seconds. The layers on disk are kept.",
        )

    def leave_note(self, error: BaseException) -> None:
        """Tell the others the cause; the first one is passed on."""
        try:
            self._notes.leave_cause(in_full(error))
            self._notes.leave_read()
        except RuntimeError:
            return  # whoever holds the store is gone: there is nobody left to tell

    def _look(self, notes: Notes) -> bool:
        """Look once for whose fault it is; returns whether that is known."""
        self._found = self._found or notes.cause() or notes.lost()
        return self._found is not None

    def _look_out(self, notes: Notes, stderr: int | None) -> None:
        """In a thread: end the process where another rank failed, or this one, and it does not end by itself."""
        message = None
        while message is None and not self._closed.wait(LOOK_S):
            message = self._reason_to_end(notes)
        if message and not self._closed.wait(GRACE_S + LINGER_S):
            _say(f"qkov: {message}", stderr)
            os._exit(2)  # the main thread is in a call that may never return
        if stderr is not None:
            os.close(stderr)

    def _reason_to_end(self, notes: Notes) -> str | None:
        if self._error:
            return f"rank {self._notes.rank}: {self._error}"
        try:
            if not notes.trouble():
                return None
            notes.leave_alive()
            if not self._look(notes):
                return None
            notes.leave_read()
        except RuntimeError as error:
            return str(self._message(self._found, error))
        return str(self._message(self._found, RuntimeError("another rank found out")))


def failed(rank: int, message: str) -> QkovError:
    """What the others say of a rank that failed by its own error."""
    return QkovError(
        f"rank {rank}",
        expected="to finish",
        got=f"an error ({message})",
        remedy="See that rank's own message; the layers on disk are kept.",
    )


def in_full(error: BaseException) -> str:
    """A rank's error, as the others are told it: its kind too, where that says whose mistake it is."""
    return str(error) if isinstance(error, QkovError) else f"{type(error).__name__}: {error}"


def _no_answer(who: str, seen_by: int, reason: str) -> QkovError:
    return QkovError(
        who,
        expected="an answer",
        got=f"none (seen by rank {seen_by}: {reason})",
        remedy="It died or hangs: look at its log and for lack of memory; if it is only slow, set QKOV_TIMEOUT_S to "
        "more seconds. The layers on disk are kept.",
    )


def _copy_of_stderr() -> int | None:
    """A descriptor of what the process writes its errors to now; None where it has closed that."""
    try:
        return os.dup(STDERR)
    except OSError:
        return None


def _say(line: str, stderr: int | None) -> None:
    """Write a last line where errors go now, and where they went when ``stderr`` was copied, if that is elsewhere."""
    with suppress(OSError, ValueError):  # nobody reads it any more
        print(line, file=sys.stderr, flush=True)
    with suppress(OSError):
        if stderr is not None and not os.path.sameopenfile(STDERR, stderr):
            os.write(stderr, f"{line}\n".encode())


def _in_short(error: BaseException) -> str:
    """The first sentence of a library's message, without the place in its source."""
    first = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", first).split(". ")[0]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(POLL_S)
