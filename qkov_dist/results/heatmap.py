"""The heatmap in memory, as users meet it: views of its blocks, answers, selections, drawings, exports.

What it holds is ``heatmap_data``. Query-head views, which repeat kv heads, are made on request by ``heatmap["K"]`` and
never stored, summed or tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qkov_dist.errors import QkovError, choose, wrong_argument
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.scoring.score_kinds import may_be_negative

from .block_view import HEAD_DIM, BlockView, Floats, UnknownEntryError
from .criteria import Criterion, judged
from .effects import Effects, Harm, Total, harm_of, no_influences_known, total_of
from .head_slices import head_ranges
from .heatmap_data import HeatmapData, Pairs
from .heatmap_plot import SCORE_LABEL, picture, plot_blocks
from .influences import Floats as Floats64
from .labelled import labelled
from .notebook import as_html
from .selection import Selection, chosen_blocks, select
from .verdict import Verdict, verdict_of
from .verdict_facts import CHANGE, UNITS, Facts, mean_losses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from xarray import Dataset


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap(HeatmapData, Mapping[str, BlockView]):
    """A mapping from block (Q, K, V, O) to its view; fields are those of :class:`HeatmapData`, the arrays behind it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def has_tested_effects(self) -> bool:
        """Whether effects are known, with their errors and tests."""
        of_blocks = (self.effects or {}).values()
        return bool(of_blocks) and all("q_value" in arrays for of_block in of_blocks for arrays in of_block.values())

    @property
    def verdict(self) -> Verdict | None:
        """The answer in words; None in files that know no effects, and before they are tested."""
        return verdict_of(self.facts) if self.has_tested_effects else None

    @property
    def facts(self) -> Facts:
        """What the answer is made of.

        Raises:
            QkovError: in files that know no effects.
        """
        places = [(block, layer, head) for block in self for layer, head in np.argwhere(self.present[block])]
        return Facts(
            (self.task_a, self.task_b),
            self.counted.sizes,
            mean_losses(self.samples_a.losses, self.samples_b.losses, self.counted),
            UNITS.get(self._setting("metric", "loss_reduction"), "nats"),
            self.fdr_alpha,
            {optimizer: self.total_effect(optimizer) for optimizer in OPTIMIZERS},
            [f"{block} {self.layers[layer]}.{self.natives(block)[head]}" for block, layer, head in places],
            self._effect_of_heads("change"),
            self._effect_of_heads("q_value"),
            self._setting("output", "dir") or "DIR",
            self.pair,
            self.places,
            are_scaled=self.samples_a.gradient_norms is not None,
        )

    def _effect_of_heads(self, key: str) -> dict[str, Floats64]:
        """Optimizer -> one effect of all present heads, block by block."""
        effects = self.effects or {}
        return {
            optimizer: np.concatenate([effects[block][optimizer][key][self.present[block]] for block in self])
            for optimizer in OPTIMIZERS
        }

    def __getitem__(self, block: str) -> BlockView:
        if block not in self.mean:
            expected, remedy = f"one of {', '.join(self.blocks)}", "Use a block that the model's layers have."
            raise UnknownEntryError("heatmap", expected=expected, got=repr(block), remedy=remedy)
        tests = self.tests.get(block)
        return BlockView(
            block,
            self.layers,
            self.heads,
            self.natives(block),
            self.groups,
            self.mean[block],
            None if self.cross is None else self.cross[block],
            self.samples_a.ids,
            self.samples_b.ids,
            tests and tests["p_value"],
            conflict_is_low=may_be_negative(self.attributes.get("score")),
            different=self.different,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        return f"Heatmap({self._summary()})"

    def _repr_html_(self) -> str:
        try:
            drawn = picture(self.plot(value=CHANGE if self.has_tested_effects else "mean"))
        except QkovError:  # without matplotlib
            drawn = None
        rows = [["block", "native heads", "largest mean score"]]
        for block in self:
            largest = np.max(self.mean[block], where=self.present[block], initial=-np.inf)
            heads = f"{len(self.natives(block))} {HEAD_DIM[block].replace('_', ' ')}s"
            rows.append([block, heads, f"{largest:.4g}"])
        verdict = self.verdict
        return as_html(self._summary(), verdict.sentences if verdict else (), drawn, rows)

    def _summary(self) -> str:
        tested = "tested" if self.statistics else "not tested"
        return (
            f"{self.task_a!r} ({len(self.samples_a)} samples) x {self.task_b!r} ({len(self.samples_b)} samples), "
            f"{len(self.layers)} layers, {len(self.heads)} heads, {len(self.kv_heads)} kv heads, {tested}"
        )

    def with_statistics(self, results: Mapping[str, Any]) -> Heatmap:
        """A copy with test results: nested dicts of arrays [layer, native head] and of JSON values."""
        return dataclasses.replace(self, statistics=dict(results))

    def with_effects(self, effects: Effects) -> Heatmap:
        """A copy with tested effects: block -> optimizer -> name -> [layer, native head]."""
        return dataclasses.replace(self, effects=dict(effects))

    def total_effect(self, optimizer: str = "adam", block: str | None = None, layer: int | None = None) -> Total:
        """What all heads add up to, or those of a block, or of a layer (the model's number), or of both.

        Raises:
            QkovError: for an optimizer, block or layer that is not there, and in files that know no effects.
        """
        choose("optimizer", optimizer, OPTIMIZERS)
        blocks = self.blocks if block is None else (self[block].block,)
        if layer is not None and layer not in self.layers:
            raise wrong_argument("layer", f"one of {', '.join(map(str, self.layers))}", layer)
        at = slice(None) if layer is None else slice(place := self.layers.index(layer), place + 1)
        influences, effects = self._known_effects
        chosen = {
            name: {optimizer: {key: values[at] for key, values in effects[name][optimizer].items()}} for name in blocks
        }
        return total_of({name: influences[name][at] for name in blocks}, chosen, self.counted, optimizer)

    def harm(self, step: float, optimizer: str = "adam", harms: str = "a") -> Harm:
        """What a step on one task does to the other, by head: step * change + step^2 * curvature along it.

        Args:
            step: Learning rate times number of steps.
            optimizer: ``sgd`` or ``adam``.
            harms: Whose loss is looked at, ``a`` or ``b``; the step is on the other task.

        Raises:
            QkovError: for an argument out of range, and in files that know no effects.
        """
        return harm_of(self._known_effects[0], self.counted, step, optimizer, harms)

    def select(
        self,
        by: str = "change_adam",
        *,
        harms: str = "A",
        optimizer: str | None = None,
        step: float | None = None,
        top: int | None = None,
        share: float | None = None,
        significant: bool = False,
        blocks: str | Iterable[str] | None = None,
    ) -> Selection:
        """Heads ranked most harmful first, and where they lie; what ``freeze_heads`` takes.

        Args:
            by: One of ``criteria.CRITERIA``: ``harm``, ``change_adam``, ``change_sgd``, ``curvature``, ...
            harms: For harm and curvature: whose loss is looked at; the step is on the other task.
            optimizer: For harm and curvature: ``sgd``, or ``adam`` by default.
            step: For harm: learning rate times number of steps.
            top: Take this many heads.
            share: Take this part of all heads of the blocks, above 0 and up to 1.
            significant: Take those with q at or below the level of the run, on the harmful side.
            blocks: Choose from these alone: ``"Q,K"``, or a list.

        Raises:
            QkovError: for arguments that are out of range or mean nothing together, and where this heatmap lacks what
                is asked for.
        """
        criterion, wanted = Criterion(by, harms, optimizer, step), chosen_blocks(blocks, self.blocks)
        tests, score = self.statistics or {}, str(self.attributes.get("score", ""))
        found = judged(criterion, effects=self.effects, harm=self.harm, mean=self.mean, statistics=tests, score=score)
        return select(
            criterion,
            {block: found[block] for block in wanted},
            {block: (self.layers, self.natives(block)) for block in wanted},
            head_ranges(self.attributes),
            top=top,
            share=share,
            alpha=self.fdr_alpha if significant else None,
        )

    @property
    def fdr_alpha(self) -> float:
        """At or below which q a head is significant: that of the last test, else of the configuration, else 0.05."""
        config = self.attributes.get("config")
        configured = config.get("statistics", {}) if isinstance(config, Mapping) else {}
        return float({**configured, **(self.statistics or {}).get("settings", {})}.get("fdr_alpha", 0.05))

    @property
    def _known_effects(self) -> tuple[Mapping[str, Floats64], Effects]:
        if self.influences is None or self.effects is None:
            raise no_influences_known()
        return self.influences, self.effects

    def save(self, path: str | Path, pairs: Pairs = "all") -> None:
        """Write ``heatmap.h5``, atomically.

        Args:
            path: The file.
            pairs: Which scores of sample pairs to keep, of those there are.

        Raises:
            QkovError: where ``path`` holds a file of another run (or none of ours), or cannot be written.
        """
        labelled(self, pairs).write(Path(path), self.run_id)

    def to_xarray(self) -> Dataset:
        """An xarray Dataset over layer, head, kv_head, sample_a, sample_b and, for effects, optimizer.

        As ArviZ has it, every variable and coordinate has ``long_name``, ``units`` and ``description``, and the whole
        says what it is of and what made it; the other attributes are those of the file, trees as JSON.
        """
        return labelled(self).to_xarray(
            {
                "title": self.title,
                "model": self.model_name,
                "num_samples_a": len(self.samples_a),
                "num_samples_b": len(self.samples_b),
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "creation_library": "qkov-dist",
                "creation_library_version": version("qkov-dist"),
            }
        )

    def to_pandas(self) -> DataFrame:
        """One row for each present native head; see ``LabelledArrays.to_pandas``."""
        return labelled(self, "none").to_pandas()

    def quantity(self, name: str) -> dict[str, Floats]:
        """Block -> [layer, native head] of one quantity: ``mean``, or any column of ``to_pandas`` (``change_adam``).

        Raises:
            QkovError: for a name that some block does not have.
        """
        if name == "mean":
            return dict(self.mean)
        arrays = labelled(self, "none")
        known = {block: arrays.quantities(block) for block in self.blocks}
        names = sorted(set.intersection(*(set(of_block) for of_block in known.values())))
        choose("value", name, ("mean", *names))
        return {block: of_block[name] for block, of_block in known.items()}

    def plot(self, ax: Axes | None = None, block: str | None = None, value: str = "mean") -> Figure:
        """One quantity of the blocks side by side, layer x native head.

        Args:
            ax: A matplotlib axis to draw one block on, in place of a figure of its own.
            block: Q, K, V or O; all of them by default.
            value: ``mean``, or any column of ``to_pandas``: ``change_adam``, ``q_value_adam``, ``overlap_statistic``.

        Raises:
            QkovError: without matplotlib, for a block or value that is not there, and for several blocks on one axis.
        """
        views = list(self.values()) if block is None else [self[block]]
        arrays = self.quantity(value)
        label = SCORE_LABEL if value == "mean" else value.replace("_", " ")
        return plot_blocks(views, [arrays[view.block] for view in views], label, self.title, ax)
