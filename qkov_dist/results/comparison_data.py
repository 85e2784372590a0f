"""What a comparison holds: every run's values by quantity and block, rank correlations, and which heads moved.

Values are those of every run in the order given; what *moved* is the last run against the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .compared_runs import RunHeader

Floats = npt.NDArray[np.float64]
Moves = Mapping[str, Mapping[str, Floats]]
MOST_NAMED = 5
_TO = " \N{RIGHTWARDS ARROW} "
_TIMES = " \N{MULTIPLICATION SIGN} "


@dataclass(frozen=True)
class Quantity:
    """One quantity of all runs.

    Attributes:
        values: Block -> float64 [run, layer, native head], NaN where there is none.
        correlation: Block -> Spearman's rank correlation of every two runs, float64 [run, run].
        low: Block -> lower ends of its intervals.
        high: Block -> upper ends.
        interval_by: Over what intervals are: ``samples`` or ``heads``; "" without any.
        moves: Block -> name (``stats.head_moves.MOVE_KEYS``) -> [layer, native head] of the last run against the first;
            None where only ranks are compared, or a file keeps no errors.
        paired: Whether moves are tested sample by sample.
    """

    values: Mapping[str, Floats]
    correlation: Mapping[str, Floats]
    low: Mapping[str, Floats]
    high: Mapping[str, Floats]
    interval_by: str
    moves: Moves | None
    paired: bool

    def moved(self, block: str, alpha: float) -> npt.NDArray[np.bool_]:
        """Which heads moved, [layer, native head]."""
        if self.moves is None:
            return np.zeros(self.values[block].shape[1:], bool)
        is_small: npt.NDArray[np.bool_] = self.moves[block]["q_value"] <= alpha
        return is_small

    def largest_step(self, block: str) -> tuple[Floats, npt.NDArray[np.intp]]:
        """The largest difference between a run and the one before, with its sign, and the number of that run."""
        steps = np.diff(self.values[block], axis=0)
        at = np.argmax(np.where(np.isnan(steps), -1.0, np.abs(steps)), axis=0)
        return np.take_along_axis(steps, at[None], axis=0)[0], at + 1


@dataclass(frozen=True)
class ComparisonData:
    """Runs of one layout, head by head.

    Attributes:
        runs: What was compared, in the order given.
        quantities: Name (``compared_runs.QUANTITIES``) -> quantity, of those that all runs know.
        differs: In what the runs differ, a few words each.
        notes: What to mind, a sentence each.
        paired: Whether all runs are of the same samples.
        alpha: A head moved where q is at most this.
        confidence: Of all intervals.
    """

    runs: tuple[RunHeader, ...]
    quantities: Mapping[str, Quantity]
    differs: tuple[str, ...]
    notes: tuple[str, ...]
    paired: bool
    alpha: float
    confidence: float

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks that the runs have."""
        return tuple(self.runs[0].natives)

    @property
    def num_heads(self) -> int:
        """Present native heads of all blocks."""
        return sum(int(mask.sum()) for mask in self.runs[0].present.values())

    @property
    def title(self) -> str:
        """Tasks and runs: what a figure must say."""
        names = [run.name for run in self.runs]
        shown = names if len(names) < 4 else [names[0], "\N{HORIZONTAL ELLIPSIS}", names[-1]]
        return f"{_TIMES.join(self.runs[0].tasks)}: {_TO.join(shown)}"

    @property
    def leading(self) -> str:
        """The quantity that is told first and shown at first."""
        return next(iter(self.quantities))

    def heads(self) -> Iterator[tuple[str, int, int]]:
        """Block, and places along its axes, of every present head."""
        for block in self.blocks:
            for layer, head in np.argwhere(self.runs[0].present[block]):
                yield block, int(layer), int(head)

    def name_of(self, block: str, layer: int, head: int) -> str:
        """A head by the model's own numbers: ``Q 14.2``."""
        return f"{block} {self.runs[0].layers[layer]}.{self.runs[0].natives[block][head]}"

    def num_moved(self, name: str) -> int:
        """How many heads moved by a quantity."""
        return sum(int(self.quantities[name].moved(block, self.alpha).sum()) for block in self.blocks)

    def most_moved(self, name: str, count: int = MOST_NAMED) -> list[str]:
        """Heads that moved by a quantity, smallest p first, then by the size of the difference."""
        moves = self.quantities[name].moves
        if moves is None:
            return []
        ranked = []
        for block, layer, head in self.heads():
            q, p, difference = (float(moves[block][key][layer, head]) for key in ("q_value", "p_value", "difference"))
            if q <= self.alpha:
                ranked.append((p, -abs(difference), self.name_of(block, layer, head)))
        return [name for *_, name in sorted(ranked)[:count]]
