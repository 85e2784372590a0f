"""What a heatmap holds: axes, samples, arrays and attributes, checked to fit each other.

Arrays are at native resolution, [layer, native head, ...]: axis 1 follows ``heads`` (query heads) for Q and O and
``kv_heads`` for K and V. Where a layer has no such head the value is NaN and ``present`` is False.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qkov_dist.data.copies import different
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.scoring.own_share_records import KNOWN

from .block_view import HEAD_DIM, Floats, Ints
from .effects import Effects, counted_samples
from .influences import Floats as Floats64
from .influences import Samples

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
        elsewhere: Which of them a task has too that is not one of the heatmap's two, bool [n]: effects leave them out;
            None where there are no other tasks.
    """

    ids: tuple[str, ...]
    num_tokens: Ints
    losses: npt.NDArray[np.float64]
    texts: tuple[str, ...]
    contents: tuple[str, ...] = ()
    gradient_norms: npt.NDArray[np.float64] | None = None
    elsewhere: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not self.contents:
            object.__setattr__(self, "contents", ("",) * len(self.ids))
        for name in ("num_tokens", "losses", "texts", "contents"):
            _check(f"samples: {name}", (len(self.ids),), np.shape(getattr(self, name)))
        for name in ("gradient_norms", "elsewhere"):
            if getattr(self, name) is not None:
                _check(f"samples: {name}", (len(self.ids),), np.shape(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False, repr=False)
class HeatmapData:
    """Scores of two tasks by block, layer, head and sample pair, and what was learnt about them.

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
        own_shares: Block -> what samples do through the Fisher (``scoring.own_share_records``), float64 [layer, native
            head, KNOWN, N]; None without ``pooled`` and in files that do not know.
        attributes: run_id, score, tasks (of a run of more than two), config (JSON), versions, seeds, warnings, notes,
            ...: strings, numbers, JSON values.
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
    own_shares: Mapping[str, Floats64] | None = None

    def __post_init__(self) -> None:
        _check("heatmap: groups", (len(self.layers),), np.shape(self.groups))
        n_a, n_b = len(self.samples_a), len(self.samples_b)
        pairs = {
            "cross": (self.cross, (n_a, n_b)),
            "pooled": (self.pooled, (n_a + n_b, n_a + n_b)),
            "influences": (self.influences, (len(OPTIMIZERS), n_a + n_b)),
            "own_shares": (self.own_shares, (len(KNOWN), n_a + n_b)),
        }
        for name, arrays in {
            "present": self.present,
            "fisher": self.fisher,
            "cross": self.cross,
            "pooled": self.pooled,
            "influences": self.influences,
            "effects": self.effects,
            "own_shares": self.own_shares,
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
    def pair(self) -> tuple[str, str] | None:
        """Its two tasks, where the run had more; None otherwise."""
        return (self.task_a, self.task_b) if len(self.attributes.get("tasks", ())) > 2 else None

    @property
    def places(self) -> tuple[int, int]:
        """Where its two tasks are among the run's."""
        tasks = list(self.attributes["tasks"]) if self.pair else [self.task_a, self.task_b]
        return tasks.index(self.task_a), tasks.index(self.task_b)

    @property
    def title(self) -> str:
        """Model, tasks and numbers of samples: what a figure must say."""
        tasks = f"{self.task_a} ({len(self.samples_a)}) \N{MULTIPLICATION SIGN} {self.task_b} ({len(self.samples_b)})"
        return f"{self.model_name}: {tasks}" if self.model_name else tasks

    def _setting(self, section: str, key: str) -> str:
        """One setting of the run's configuration as text; "" where the file does not say."""
        config = self.attributes.get("config")
        return str(config.get(section, {}).get(key, "")) if isinstance(config, Mapping) else ""

    def natives(self, block: str) -> tuple[int, ...]:
        """Head numbers along a block's native axis."""
        return self.heads if HEAD_DIM[block] == "head" else self.kv_heads

    @property
    def counted(self) -> Samples:
        """The samples that effects are of: not those that both tasks have, or one and a task that is not here."""
        return counted_of(self.samples_a, self.samples_b)


def counted_of(samples_a: SampleTable, samples_b: SampleTable) -> Samples:
    """Which samples of two tasks count in effects."""
    found = counted_samples(samples_a.contents, samples_b.contents)
    tables = (samples_a, samples_b)
    elsewhere = [np.zeros(len(table), bool) if table.elsewhere is None else table.elsewhere for table in tables]
    here = ~np.concatenate(elsewhere)
    return Samples(found.a & here, found.b & here)


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
