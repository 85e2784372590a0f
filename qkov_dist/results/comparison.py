"""A comparison of runs, as page, terminal and programs read it: by quantity, block and head, and the answer in words.

Values are those of every run in the order given; what *moved* is the last run against the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .block_view import missing_extra
from .compared_runs import QUANTITIES, RunHeader

if TYPE_CHECKING:
    from pandas import DataFrame

Floats = npt.NDArray[np.float64]
Moves = Mapping[str, Mapping[str, Floats]]
MOST_NAMED = 5
WITHOUT_RANKS = ("relative_adam", "relative_sgd")  # those of change


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
class Comparison:
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

    @property
    def verdict(self) -> list[str]:
        """The answer in words, a sentence or two each: what moved, how alike heads rank, in what runs differ."""
        from .comparison_words import words

        return words(self)

    def records(self) -> list[dict[str, Any]]:
        """One dict a head: block, layer, head, then of each quantity its runs' values, and what its tests say.

        Columns are ``change_adam_1``, ``change_adam_2``, ... by the runs' order, ``change_adam_difference`` and so on.
        """
        found = []
        for block, layer, head in self.heads():
            record: dict[str, Any] = {
                "block": block,
                "layer": self.runs[0].layers[layer],
                "head": self.runs[0].natives[block][head],
            }
            for name, quantity in self.quantities.items():
                record |= self._of_head(name, quantity, block, (layer, head))
            found.append(record)
        return found

    def _of_head(self, name: str, quantity: Quantity, block: str, at: tuple[int, int]) -> dict[str, Any]:
        values = quantity.values[block][(slice(None), *at)]
        record = {f"{name}_{place}": float(value) for place, value in enumerate(values, 1)}
        moves = quantity.moves[block] if quantity.moves is not None else {}
        record |= {f"{name}_{key}": float(array[at]) for key, array in moves.items()}
        if len(values) > 2:
            step, at_run = (of_block[at] for of_block in quantity.largest_step(block))
            record |= {f"{name}_largest_step": float(step), f"{name}_largest_step_to": int(at_run) + 1}
        return record

    def correlations(self) -> list[dict[str, Any]]:
        """One dict for every quantity, block and two runs (by their places, from 1): the rank correlation."""
        return [
            {
                "quantity": name,
                "block": block,
                "first": one + 1,
                "second": other + 1,
                "rank_correlation": float(quantity.correlation[block][one, other]),
                "ci_low": float(quantity.low[block][one, other]),
                "ci_high": float(quantity.high[block][one, other]),
                "interval_by": quantity.interval_by,
            }
            for name, quantity in self.quantities.items()
            if name not in WITHOUT_RANKS
            for block in self.blocks
            for one in range(len(self.runs))
            for other in range(one + 1, len(self.runs))
        ]

    def to_pandas(self) -> DataFrame:
        """One row for each present native head; columns are those of ``records``."""
        try:
            import pandas
        except ImportError as error:
            raise missing_extra("to_pandas", "pandas") from error
        return pandas.DataFrame(self.records())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; what is not there is None."""
        return {
            "answer": self.verdict,
            "runs": [{"name": run.name, "run_id": run.run_id, "tasks": list(run.tasks)} for run in self.runs],
            "differs": list(self.differs),
            "notes": list(self.notes),
            "paired": self.paired,
            "alpha": self.alpha,
            "confidence": self.confidence,
            "moved": {name: self.num_moved(name) for name, of in self.quantities.items() if of.moves is not None},
            "correlations": _without_nan(self.correlations()),
            "heads": _without_nan(self.records()),
        }


_TO = " \N{RIGHTWARDS ARROW} "
_TIMES = " \N{MULTIPLICATION SIGN} "


def _without_nan(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in record.items()}
        for record in records
    ]


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Quantities in the order in which they are told."""
    return [name for name in QUANTITIES if name in names]
