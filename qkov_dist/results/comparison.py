"""A comparison of runs, as page, terminal and programs read it: the answer in words, and a record of every head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .block_view import missing_extra
from .compared_runs import QUANTITIES
from .comparison_data import ComparisonData, Quantity
from .comparison_words import words

if TYPE_CHECKING:
    from pandas import DataFrame

WITHOUT_RANKS = ("relative_adam", "relative_sgd")  # those of change


class Comparison(ComparisonData):
    """Runs of one layout, head by head; fields are those of :class:`ComparisonData`."""

    @property
    def verdict(self) -> list[str]:
        """The answer in words, a sentence or two each: what moved, how alike heads rank, in what runs differ."""
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


def _without_nan(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in record.items()}
        for record in records
    ]


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Quantities in the order in which they are told."""
    return [name for name in QUANTITIES if name in names]
