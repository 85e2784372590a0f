"""What ranks leave for each other, when one fails, in the store that their process group has for its addresses.

    qkov/failed             the cause: the first rank that failed by its own error, and its message
    qkov/failed/symptom     there is a rank whose call broke, or that failed
    qkov/failed/lost        the ranks that the first to find out took for dead or hanging
    qkov/failed/RANK        this rank failed ("cause"), or a call of its broke because of another ("symptom")
    qkov/failed/RANK/alive  this rank is there, although it may be far from its next call
    qkov/failed/RANK/read   this rank has read what it needs

A step of the Python API has notes of its own, in the place of ``qkov/failed``; a cause that is left outside of all
steps counts in each of them. Every call raises RuntimeError where the process that holds the store is gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

ROOT = "qkov/failed"

MESSAGE_LENGTH = 2000


@dataclass(frozen=True)
class Cause:
    """A rank's own error."""

    rank: int
    message: str


@dataclass(frozen=True)
class Notes:
    """The notes of one process group, as one rank leaves and reads them.

    Attributes:
        store: The key-value store of the process group. Its calls wait for each other: a thread needs a clone.
        rank: This rank.
        ranks: All ranks of the group, by their numbers among all.
        root: Where they are.
    """

    store: Any
    rank: int
    ranks: Sequence[int]
    root: str = ROOT

    def clone(self) -> Notes:
        """The same notes over a connection of its own, for another thread."""
        return replace(self, store=self.store.clone())

    def leave_cause(self, message: str) -> None:
        """Say that this rank failed by its own error."""
        note = json.dumps({"rank": self.rank, "message": message[:MESSAGE_LENGTH]})
        self.store.compare_set(self.root, "", note)
        self._leave("cause")

    def leave_symptom(self) -> None:
        """Say that a call of this rank broke because of another."""
        self._leave("symptom")

    def leave_lost(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Say which ranks are lost; returns what the first rank said that did."""
        found = self.store.compare_set(f"{self.root}/lost", "", json.dumps(sorted(ranks)))
        return tuple(json.loads(found))

    def leave_alive(self) -> None:
        """Say that this rank is there."""
        self.store.set(f"{self.root}/{self.rank}/alive", "")

    def leave_read(self) -> None:
        """Say that this rank needs the store no more."""
        self.store.set(f"{self.root}/{self.rank}/read", "")

    def cause(self) -> Cause | None:
        """Another rank's own error; the first where there are several."""
        for root in self._roots:
            if self.store.check([root]):
                cause = Cause(**json.loads(self.store.get(root)))
                return cause if cause.rank != self.rank else None
        return None

    def lost(self) -> tuple[int, ...] | None:
        """The ranks that are lost, if a rank has found out."""
        key = f"{self.root}/lost"
        return tuple(json.loads(self.store.get(key))) if self.store.check([key]) else None

    def trouble(self) -> bool:
        """Whether any rank has left a note."""
        return any(self.store.check([f"{root}/symptom"]) for root in self._roots)

    def silent(self) -> tuple[int, ...]:
        """Other ranks that neither failed nor saw a call break: dead, hanging, or at work far from their next call."""
        return tuple(rank for rank in self._others() if not self.store.check([f"{self.root}/{rank}"]))

    def alive(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Those of some ranks that said that they are there."""
        return tuple(rank for rank in ranks if self.store.check([f"{self.root}/{rank}/alive"]))

    def read_by(self, ranks: Iterable[int]) -> bool:
        """Whether all of some ranks have read what they need."""
        return all(self.store.check([f"{self.root}/{rank}/read"]) for rank in ranks)

    @property
    def _roots(self) -> tuple[str, ...]:
        return (self.root,) if self.root == ROOT else (self.root, ROOT)

    def _leave(self, kind: str) -> None:
        self.store.set(f"{self.root}/{self.rank}", kind)
        self.store.set(f"{self.root}/symptom", "")

    def _others(self) -> Iterable[int]:
        return (rank for rank in self.ranks if rank != self.rank)
