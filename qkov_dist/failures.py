"""What the other ranks learn when one fails: which, and why; and that none of them waits for ever.

A rank that fails leaves a note in the store that the process group has for its addresses, then closes its connections.
The calls of the others break on that, and they read the note. There are two kinds of notes: a *cause*, a rank's own
error, and a *symptom*, a call that broke because of another rank. Where no cause turns up, the ranks without any note
are those that died or hang. A rank whose process holds the store stays until the others have read it.

Some backends (NCCL) do not notice that a peer is gone, and a rank may be far from its next call: a thread looks for
notes too, and ends a process that does not end by itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import QkovError

NOTE = "qkov/failed"
GRACE_S = 5.0  # for a note to turn up
LINGER_S = 10.0  # for others to read the store of a process that ends, and for a process to end by itself
POLL_S = 0.05
SIGNS = ("connection", "timed out", "timeout", "gloo", "nccl", "peer", "socket")


class Watch:
    """The notes of one process group, as one rank sees them.

    Args:
        store: The key-value store of the process group.
        rank: This rank.
        size: How many ranks there are.
        store_is_of_rank_0: Whether the store lives in rank 0's process, and not in the launcher's.
        ends_process: Whether to end this process where it does not end by itself.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, store_is_of_rank_0: bool = False, ends_process: bool = False
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._store_is_of_rank_0, self._ends_process = store_is_of_rank_0, ends_process
        self._error: BaseException | None = None
        self._lost: list[int] = []
        self._closed = threading.Event()

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """Leave a note when this rank fails; when another did, raise an error that names it."""
        if self._ends_process:
            threading.Thread(target=self._look_out, name="qkov-failures", daemon=True).start()
        try:
            yield
        except BaseException as error:
            self._error = error
            if isinstance(error, RuntimeError) and is_broken_call(error):
                raise self._explained(error) from error
            self._leave_note(error)
            raise

    def close(self) -> None:
        """Take leave, once the connections are closed: whoever holds the store waits until the others have read it."""
        if self._error and self._store_is_of_rank_0 and self._rank == 0:
            staying = [rank for rank in range(1, self._size) if rank not in self._lost]
            self._until(lambda: all(self._store.check([f"{NOTE}/{rank}/read"]) for rank in staying), LINGER_S)
        self._closed.set()

    def _explained(self, error: RuntimeError) -> QkovError:
        """The error that says whose fault a broken call is."""
        reason = _in_short(error)
        try:
            self._store.set(f"{NOTE}/{self._rank}", "symptom")
            self._until(lambda: self._cause() is not None, GRACE_S)
            cause = self._cause()
            self._lost = [] if cause else self._silent()
            self._store.set(f"{NOTE}/{self._rank}/read", "")
        except RuntimeError:
            return _no_answer(self._holder, self._rank, reason)
        if cause:
            return _failed(cause)
        if self._lost:
            return _no_answer(f"rank {', '.join(map(str, self._lost))}", self._rank, reason)
        return QkovError(
            f"rank {self._rank}",
            expected="to answer in time",
            got=f"other ranks that gave up waiting ({reason})",
            remedy="Find out what kept it, or set QKOV_TIMEOUT_S to more seconds. The layers on disk are kept.",
        )

    @property
    def _holder(self) -> str:
        """Who is gone when the store is."""
        return "rank 0" if self._store_is_of_rank_0 else "the launcher"

    def _leave_note(self, error: BaseException) -> None:
        """Tell the others the cause; the first one is passed on."""
        message = str(error) if isinstance(error, QkovError) else f"{type(error).__name__}: {error}"
        note = json.dumps({"rank": self._rank, "message": message[:2000]})
        try:
            self._store.compare_set(NOTE, "", note)
            self._store.set(f"{NOTE}/{self._rank}", "cause")
            self._store.set(f"{NOTE}/{self._rank}/read", "")
        except RuntimeError:
            return  # whoever holds the store is gone: there is nobody left to tell

    def _cause(self) -> dict[str, Any] | None:
        """Another rank's own error; the first where there are several."""
        if not self._store.check([NOTE]):
            return None
        note: dict[str, Any] = json.loads(self._store.get(NOTE))
        return note if note["rank"] != self._rank else None

    def _silent(self) -> list[int]:
        """Other ranks that left no note."""
        others = (rank for rank in range(self._size) if rank != self._rank)
        return [rank for rank in others if not self._store.check([f"{NOTE}/{rank}"])]

    def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(POLL_S)

    def _look_out(self) -> None:
        """In a thread: end the process where another rank failed, or this one, and it does not end by itself."""
        message = None
        while message is None and not self._closed.wait(1):
            message = self._reason_to_end()
        if message and not self._closed.wait(GRACE_S + LINGER_S):
            print(f"qkov: {message}", file=sys.stderr, flush=True)
            os._exit(2)  # the main thread is in a call that may never return

    def _reason_to_end(self) -> str | None:
        if self._error:
            return f"rank {self._rank}: {self._error}"
        try:
            cause = self._cause()
        except RuntimeError as error:
            return str(_no_answer(self._holder, self._rank, _in_short(error)))
        return str(_failed(cause)) if cause else None


def is_broken_call(error: RuntimeError) -> bool:
    """Whether a call failed because of another rank, by its type or text."""
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or any(sign in text for sign in SIGNS)


def _failed(cause: Mapping[str, Any]) -> QkovError:
    return QkovError(
        f"rank {cause['rank']}",
        expected="to finish",
        got=f"an error ({cause['message']})",
        remedy="See that rank's own message; the layers on disk are kept.",
    )


def _no_answer(who: str, seen_by: int, reason: str) -> QkovError:
    return QkovError(
        who,
        expected="an answer",
        got=f"none (seen by rank {seen_by}: {reason})",
        remedy="It died or hangs: look at its log and for lack of memory; if it is only slow, set QKOV_TIMEOUT_S to "
        "more seconds. The layers on disk are kept.",
    )


def _in_short(error: BaseException) -> str:
    """The first sentence of a library's message, without the place in its source."""
    first = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", first).split(". ")[0]
