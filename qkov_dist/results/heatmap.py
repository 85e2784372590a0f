"""The heatmap in memory: scores of two tasks by block, layer, head and sample pair, and what was learnt about them.

Arrays are at native resolution, [layer, native head, ...]: axis 1 follows ``heads`` (query heads) for Q and O and
``kv_heads`` for K and V. Where a layer has no such head the value is NaN and ``present`` is False. Query-head views,
which repeat kv heads, are made on request by ``heatmap["K"]`` (``views``) and never stored, summed or tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from qkov_dist.data.copies import different
from qkov_dist.errors import QkovError, choose, wrong_argument
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.scoring.score_kinds import may_be_negative

from .block_view import HEAD_DIM, BlockView, Floats, Ints, UnknownEntryError
from .criteria import Criterion, judged
from .effects import EFFECT_KEYS, Effects, Harm, Total, counted_samples, harm_of, no_influences_known, total_of
from .export import LabelledArrays, Variable, split_arrays
from .head_slices import head_ranges
from .heatmap_plot import SCORE_LABEL, picture, plot_blocks
from .influences import Floats as Floats64
from .influences import Samples
from .notebook import as_html
from .selection import Selection, chosen_blocks, select
from .verdict import CHANGE, Facts, Verdict, verdict_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from xarray import Dataset

Pairs = Literal["none", "cross", "all"]
FISHER_KEYS = ("mean", "min", "ridge_share", "share_a")


@dataclass(frozen=True)
class SampleTable:
    """The samples of one task, in file order.

    Args:
        ids: Their ids.
        num_tokens: Labelled tokens, int64 [n].
        losses: Their own losses, float64 [n].
        texts: Their text, for reports ("" where there is none).
        contents: Hashes of their tokens and labels (``copies``), by which a sample is known again; "" where unknown.
        gradient_norms: Norms of their gradients over all scored weights, float64 [n], by which
            ``metric.sample_scale: unit`` has divided them; None where gradients are as they were.
    """

    ids: tuple[str, ...]
    num_tokens: Ints
    losses: npt.NDArray[np.float64]
    texts: tuple[str, ...]
    contents: tuple[str, ...] = ()
    gradient_norms: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if not self.contents:
            object.__setattr__(self, "contents", ("",) * len(self.ids))
        for name in ("num_tokens", "losses", "texts", "contents"):
            _check(f"samples: {name}", (len(self.ids),), np.shape(getattr(self, name)))
        if self.gradient_norms is not None:
            _check("samples: gradient_norms", (len(self.ids),), np.shape(self.gradient_norms))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap(Mapping[str, BlockView]):
    """A mapping from block (Q, K, V, O) to its view, and the arrays behind it.

    Args:
        task_a: Name of task A, whose samples are i.
        task_b: Name of task B, whose samples are j.
        layers: Model layer numbers scored.
        heads: Query heads selected.
        kv_heads: Kv heads that these read, over all layers.
        groups: Query heads of one kv head, [layer].
        samples_a: A's samples.
        samples_b: B's samples.
        mean: Block -> mean score over the cross pairs, float64 [layer, native head].
        present: Block -> whether the layer has this head, bool [layer, native head].
        fisher: Block -> ``mean``, ``min``, ``ridge_share`` and ``share_a`` (the part of its sum that A's samples
            contribute) of the Fisher, float64 [layer, native head].
        cross: Block -> scores [layer, native head, n_a, n_b] (perhaps a view of ``pooled``), or None.
        pooled: Block -> scores [layer, native head, N, N] among all samples, A's first, or None.
        shared: Parameters that no head owns: ``O_bias`` -> ``mean`` [layer] and perhaps ``cross`` [layer, n_a, n_b].
        statistics: Test results (``with_statistics``), or None.
        influences: Block -> what each sample has to do with the effect of a step (``influences``), float64
            [layer, native head, optimizer, N], A's samples first; None in files that do not know.
        effects: Block -> optimizer -> name (``effects.EFFECT_KEYS``) -> float64 [layer, native head]; None where there
            are no influences. Before a test they lack what tests add.
        attributes: run_id, score, config (JSON), versions, seeds, warnings, notes, ...: strings, numbers, JSON values.
    """

    task_a: str
    task_b: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    groups: Ints
    samples_a: SampleTable
    samples_b: SampleTable
    mean: Mapping[str, Floats]
    present: Mapping[str, npt.NDArray[np.bool_]]
    fisher: Mapping[str, Mapping[str, Floats]]
    cross: Mapping[str, Floats] | None = None
    pooled: Mapping[str, Floats] | None = None
    shared: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    statistics: Mapping[str, Any] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    influences: Mapping[str, Floats64] | None = None
    effects: Effects | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        _check("heatmap: groups", (len(self.layers),), np.shape(self.groups))
        n_a, n_b = len(self.samples_a), len(self.samples_b)
        pairs = {
            "cross": (self.cross, (n_a, n_b)),
            "pooled": (self.pooled, (n_a + n_b, n_a + n_b)),
            "influences": (self.influences, (len(OPTIMIZERS), n_a + n_b)),
        }
        for name, arrays in {
            "present": self.present,
            "fisher": self.fisher,
            "cross": self.cross,
            "pooled": self.pooled,
            "influences": self.influences,
            "effects": self.effects,
        }.items():
            if arrays is not None and set(arrays) != set(self.mean):
                raise _wrong(f"heatmap: {name}", f"blocks {sorted(self.mean)}", f"{sorted(arrays)}")
        for block, mean in self.mean.items():
            if block not in BLOCKS or not self.layers or not self.natives(block):
                raise _wrong(f"heatmap: block {block}", "Q, K, V or O with layers and heads", "another, or none")
            shape = (len(self.layers), len(self.natives(block)))
            _check(f"heatmap: mean {block}", shape, np.shape(mean))
            _check(f"heatmap: present {block}", shape, np.shape(self.present[block]))
            if not np.isnan(mean[~self.present[block]]).all():
                raise _wrong(f"heatmap: mean {block}", "NaN where a layer has no such head", "numbers")
            for key in FISHER_KEYS:
                _check(f"heatmap: fisher {block} {key}", shape, np.shape(self.fisher[block].get(key, 0.0)))
            for name, (scores, last) in pairs.items():
                if scores is not None:
                    _check(f"heatmap: {name} {block}", (*shape, *last), np.shape(scores[block]))
            for optimizer, arrays in (self.effects or {}).get(block, {}).items():
                for key, values in arrays.items():
                    _check(f"heatmap: effects {block} {optimizer} {key}", shape, np.shape(values))

    @property
    def run_id(self) -> str:
        """What the run was, hashed; "" where nobody said."""
        return str(self.attributes.get("run_id", ""))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks scored, in the order Q, K, V, O."""
        return tuple(block for block in BLOCKS if block in self.mean)

    @property
    def deciding(self) -> str:
        """Name of the statistic that decides which heads are significant."""
        settings = (self.statistics or {}).get("settings", {})
        return str(settings.get("statistic", "cross_mean"))

    @property
    def tests(self) -> Mapping[str, Any]:
        """The deciding statistic's tests: block -> name -> [layer, native head]; empty before a test."""
        found: Mapping[str, Any] = (self.statistics or {}).get(self.deciding, {})
        return found

    @property
    def different(self) -> npt.NDArray[np.bool_]:
        """Which pairs of A x B are of different samples, bool [n_a, n_b]: not a sample and its copy."""
        return different(self.samples_a.contents, self.samples_b.contents)

    @property
    def model_name(self) -> str:
        """The model's name, the last part of its path; else its type; "" where the file says neither."""
        return self._setting("model", "path").rstrip("/").rpartition("/")[2] or str(
            self.attributes.get("model_type", "")
        )

    @property
    def title(self) -> str:
        """Model, tasks and numbers of samples: what a figure must say."""
        tasks = f"{self.task_a} ({len(self.samples_a)}) \N{MULTIPLICATION SIGN} {self.task_b} ({len(self.samples_b)})"
        return f"{self.model_name}: {tasks}" if self.model_name else tasks

    @property
    def has_tested_effects(self) -> bool:
        """Whether effects are known, with their errors and tests."""
        of_blocks = (self.effects or {}).values()
        return bool(of_blocks) and all("q_value" in arrays for of_block in of_blocks for arrays in of_block.values())

    @property
    def verdict(self) -> Verdict | None:
        """The answer in words; None in files that know no effects, and before they are tested."""
        if not self.has_tested_effects:
            return None
        places = [(block, layer, head) for block in self for layer, head in np.argwhere(self.present[block])]
        facts = Facts(
            (self.task_a, self.task_b),
            self.counted.sizes,
            self.fdr_alpha,
            {optimizer: self.total_effect(optimizer) for optimizer in OPTIMIZERS},
            [f"{block} {self.layers[layer]}.{self.natives(block)[head]}" for block, layer, head in places],
            self._effect_of_heads("change"),
            self._effect_of_heads("q_value"),
            self._setting("output", "dir") or "DIR",
        )
        return verdict_of(facts)

    def _setting(self, section: str, key: str) -> str:
        """One setting of the run's configuration as text; "" where the file does not say."""
        config = self.attributes.get("config")
        return str(config.get(section, {}).get(key, "")) if isinstance(config, Mapping) else ""

    def _effect_of_heads(self, key: str) -> dict[str, Floats64]:
        """Optimizer -> one effect of all present heads, block by block."""
        effects = self.effects or {}
        return {
            optimizer: np.concatenate([effects[block][optimizer][key][self.present[block]] for block in self])
            for optimizer in OPTIMIZERS
        }

    def natives(self, block: str) -> tuple[int, ...]:
        """Head numbers along a block's native axis."""
        return self.heads if HEAD_DIM[block] == "head" else self.kv_heads

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
        return as_html(self._summary(), self.verdict, drawn, rows)

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

    @property
    def counted(self) -> Samples:
        """The samples that effects are of: not those that both tasks have."""
        return counted_samples(self.samples_a.contents, self.samples_b.contents)

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
        """What a step on one task does to the other, by head: step * change + step^2 * curvature.

        Args:
            step: Learning rate times number of steps.
            optimizer: ``sgd`` or ``adam``.
            harms: Whose loss is looked at, ``a`` or ``b``; the step is on the other task.

        Raises:
            QkovError: for an argument out of range, and in files that know no effects.
        """
        return harm_of(*self._known_effects, self.counted, step, optimizer, harms)

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

    def labelled(self, pairs: Pairs = "all") -> LabelledArrays:
        """All of it as labelled arrays, as stored; ``pairs`` limits which scores of sample pairs are among them."""
        arrays, others = split_arrays(self.statistics or {})
        sizes = {"sample_a": len(self.samples_a), "sample_b": len(self.samples_b)}
        num = sum(sizes.values())
        if self.influences is not None:
            sizes["sample"] = num
        if pairs == "all" and self.pooled is not None:
            sizes["sample"] = sizes["sample_right"] = num
        coords = {
            "layer": np.array(self.layers, np.int64),
            "head": np.array(self.heads, np.int64),
            "kv_head": np.array(self.kv_heads, np.int64),
        } | {name: np.arange(size) for name, size in sizes.items()}
        tests = tuple(self._statistics_variable(path, array) for path, array in arrays.items())
        extra = {dim: np.arange(int(dim[1:])) for test in tests for dim in test.dims if dim not in coords}
        names = {"task_a": self.task_a, "task_b": self.task_b}
        stored = {**self.attributes, **names, **({"statistics": others} if self.statistics is not None else {})}
        return LabelledArrays(
            coords | extra, (*self._summaries(), *self._effects(), *self._pair_scores(pairs), *tests), stored
        )

    def _summaries(self) -> Iterator[Variable]:
        yield Variable("group", ("layer",), np.asarray(self.groups, np.int64))
        for task, table in (("a", self.samples_a), ("b", self.samples_b)):
            columns: dict[str, Any] = {
                "id": table.ids,
                "num_tokens": table.num_tokens,
                "loss": table.losses,
                "text": table.texts,
                "content": table.contents,
            }
            if table.gradient_norms is not None:
                columns["gradient_norm"] = table.gradient_norms
            for name, values in columns.items():
                yield Variable(f"samples/{task}/{name}", (f"sample_{task}",), values)
        for block in self:
            dims = ("layer", HEAD_DIM[block])
            yield Variable(f"heatmap/{block}", dims, self.mean[block])
            yield Variable(f"present/{block}", dims, self.present[block])
            for key in FISHER_KEYS:
                yield Variable(f"fisher/{block}/{key}", dims, self.fisher[block][key])
        for name, arrays in self.shared.items():
            yield Variable(f"shared/{name}/heatmap", ("layer",), arrays["mean"])

    def _effects(self) -> Iterator[Variable]:
        for block in self:
            dims = ("layer", HEAD_DIM[block])
            for optimizer, arrays in (self.effects or {}).get(block, {}).items():
                for key in filter(arrays.__contains__, EFFECT_KEYS):
                    yield Variable(f"effects/{block}/{optimizer}/{key}", dims, arrays[key])
            if self.influences is not None:
                for place, optimizer in enumerate(OPTIMIZERS):
                    yield Variable(
                        f"influences/{block}/{optimizer}", (*dims, "sample"), self.influences[block][:, :, place]
                    )

    def _pair_scores(self, pairs: Pairs) -> Iterator[Variable]:
        cross = ("sample_a", "sample_b")
        for block in self:
            dims = ("layer", HEAD_DIM[block])
            if pairs != "none" and self.cross is not None:
                yield Variable(f"scores/{block}", (*dims, *cross), self.cross[block])
            if pairs == "all" and self.pooled is not None:
                yield Variable(f"scores_all/{block}", (*dims, "sample", "sample_right"), self.pooled[block])
        for name, arrays in self.shared.items():
            if pairs != "none" and "cross" in arrays:
                yield Variable(f"shared/{name}/scores", ("layer", *cross), arrays["cross"])

    def _statistics_variable(self, path: str, array: npt.NDArray[Any]) -> Variable:
        """Arrays [layer, native head, ...] under a block's name; any other axis is a dimension ``n<size>``."""
        block = next((part for part in path.split("/") if part in self.mean), None)
        known = ("layer", HEAD_DIM[block]) if block and array.shape[:2] == self.mean[block].shape else ()
        dims = (*known, *(f"n{size}" for size in array.shape[len(known) :]))
        return Variable(f"statistics/{path}", dims, array)

    def save(self, path: str | Path, pairs: Pairs = "all") -> None:
        """Write ``heatmap.h5``, atomically.

        Args:
            path: The file.
            pairs: Which scores of sample pairs to keep, of those there are.

        Raises:
            QkovError: where ``path`` holds a file of another run (or none of ours), or cannot be written.
        """
        self.labelled(pairs).write(Path(path), self.run_id)

    def to_xarray(self) -> Dataset:
        """An xarray Dataset over layer, head, kv_head, sample_a and sample_b, without copies."""
        return self.labelled().to_xarray()

    def to_pandas(self) -> DataFrame:
        """One row for each present native head; see ``Labelled.to_pandas``."""
        return self.labelled("none").to_pandas()

    def quantity(self, name: str) -> dict[str, Floats]:
        """Block -> [layer, native head] of one quantity: ``mean``, or any column of ``to_pandas`` (``change_adam``).

        Raises:
            QkovError: for a name that some block does not have.
        """
        if name == "mean":
            return dict(self.mean)
        arrays = self.labelled("none")
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


def cross_of_pooled(pooled: Mapping[str, Floats], num_a: int) -> dict[str, Floats]:
    """The scores of pairs (i in A, j in B), as views."""
    return {block: scores[..., :num_a, num_a:] for block, scores in pooled.items()}


def mean_over_pairs(
    cross: Mapping[str, Floats], pairs: npt.NDArray[np.bool_] | None = None
) -> dict[str, npt.NDArray[np.float64]]:
    """Mean score over pairs (of different samples, bool [n_a, n_b]; all by default), float64 [layer, native head].

    NaN stays NaN, and is what there is where no pair is of different samples.
    """
    if pairs is None or pairs.all():
        return {block: scores.mean(axis=(-2, -1), dtype=np.float64) for block, scores in cross.items()}
    kept = {block: np.stack([layer[..., pairs] for layer in scores]) for block, scores in cross.items()}
    if not pairs.any():
        return {block: np.full(scores.shape[:2], np.nan) for block, scores in kept.items()}
    return {block: scores.mean(axis=-1, dtype=np.float64) for block, scores in kept.items()}


def _check(where: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    if expected != got:
        raise _wrong(where, f"shape {expected}", f"{got}")


def _wrong(where: str, expected: str, got: str) -> QkovError:
    return QkovError(where, expected=expected, got=got, remedy="Build heatmaps through qkov_dist, or fix this array.")
