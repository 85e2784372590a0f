"""Summed layers become a heatmap: axes, means, what was learnt of the Fisher, and what a reader has to be warned of.

Normalisation (a mean over pairs, a mean of I, a fraction of elements) happens here, after all sums. Layers come one at
a time; scores too large for memory wait in a scratch file.

What scores say of single samples: that one's gradients overflow, or that one has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qkov_dist.data.copies import different
from qkov_dist.errors import QkovError
from qkov_dist.memory import scratch_array
from qkov_dist.scoring.fisher_sums import FISHER_COLUMNS, FisherSums, column
from qkov_dist.scoring.influence_records import of_samples
from qkov_dist.scoring.own_share_records import known
from qkov_dist.scoring.tiles import SHARED_O_BIAS

from .effects import untested_effects
from .fisher_warnings import warnings_of
from .heatmap import Heatmap
from .heatmap_data import FISHER_KEYS, SampleTable, counted_of, cross_of_pooled, mean_over_pairs
from .metadata import HeatmapMetadata, LayerAxes
from .partial_schema import BlockPartial, Floats, LayerPartial


class _Block:
    """Scores [layer, head, left, right], Fisher sums [layer, head, columns], influences and what own shares do of one
    block; NaN where no head is.
    """

    def __init__(self, shape: tuple[int, int], some: BlockPartial, folder: Path | None, *, keeps_scores: bool) -> None:
        self.scores = None
        if keeps_scores:
            self.scores = scratch_array((*shape, *some.scores.shape[1:]), some.scores.dtype, folder)
        self.means = np.full(shape, np.nan)  # of scores that are not kept
        self.sums = np.full((*shape, len(FISHER_COLUMNS)), np.nan)
        self.influences, self.own_shares = (
            np.full((*shape, *of_heads.shape[1:]), np.nan) for of_heads in (some.influences, some.own_shares)
        )

    def filled(self) -> Floats | None:
        """The scores, when all layers are there; None where they are not kept."""
        if self.scores is not None:
            self.scores[np.isnan(self.sums[..., 0])] = np.nan
        return self.scores


class Assembly:
    """Takes the whole layers (summed over ranks) of two tasks, one after another, and makes a heatmap of them.

    Args:
        metadata: Axes, samples and provenance.
        pooled: Whether the sums are among all pooled samples; as the metadata says by default.
        folder: Where scores wait that are too large for memory; the system's temporary folder by default.
        keeps_scores: Whether the heatmap has scores of sample pairs, or their means alone.
    """

    def __init__(
        self,
        metadata: HeatmapMetadata,
        *,
        pooled: bool | None = None,
        folder: Path | None = None,
        keeps_scores: bool = True,
    ) -> None:
        self.metadata, self._folder, self._keeps_scores = metadata, folder, keeps_scores
        self._pooled = metadata.pooled if pooled is None else pooled
        self._places = {layer.layer: place for place, layer in enumerate(metadata.layers)}
        self._pairs = different(*(table.contents for table in metadata.samples))
        self._blocks: dict[str, _Block] = {}
        self._shared: dict[int, Floats] = {}  # O's bias by the layer's place
        self._without = WithoutGradient()
        self._seen: set[int] = set()

    def take(self, number: int, part: LayerPartial) -> None:
        """Take one layer.

        Raises:
            QkovError: for a head of it that is missing.
        """
        place = self._places[number]
        for block in self.metadata.blocks:
            if block in self.metadata.layers[place].heads:
                self._without.see(number, block, self._take_block(place, block, part), pooled=self._pooled)
        if SHARED_O_BIAS in part.shared:
            self._shared[place] = part.shared[SHARED_O_BIAS]
        self._seen.add(number)

    def _take_block(self, place: int, block: str, part: LayerPartial) -> BlockPartial:
        """Put one block's heads of a layer in their places."""
        layer, axis = self.metadata.layers[place], self.metadata.axis(block)
        found = block_of(part, layer, block)
        if block not in self._blocks:
            shape = len(self.metadata.layers), len(axis)
            self._blocks[block] = _Block(shape, found, self._folder, keeps_scores=self._keeps_scores)
        of_block, at = self._blocks[block], np.searchsorted(axis, found.heads)
        if of_block.scores is not None:
            of_block.scores[place, at] = found.scores
        else:
            of_block.means[place, at] = self._mean({block: found.scores[None]})[block][0]
        of_block.sums[place, at], of_block.influences[place, at] = found.fisher_sums, found.influences
        if found.own_shares.shape[1] == of_block.own_shares.shape[2]:
            of_block.own_shares[place, at] = found.own_shares
        else:  # a layer of a file of before
            of_block.own_shares = of_block.own_shares[..., :0]
        return found

    def _mean(self, scores: Mapping[str, Floats]) -> dict[str, np.ndarray]:
        """Mean score over the pairs of A x B, [layer, head]."""
        num_a = len(self.metadata.samples[0])
        return mean_over_pairs(cross_of_pooled(scores, num_a) if self._pooled else scores, self._pairs)

    def heatmap(self) -> Heatmap:
        """The heatmap, when all layers are there.

        Raises:
            QkovError: for a layer that is missing.
        """
        metadata = self.metadata
        _check_all(metadata, self._seen)
        filled = {block: self._blocks[block].filled() for block in metadata.blocks}
        scores = {block: of_block for block, of_block in filled.items() if of_block is not None}
        sums = {block: self._blocks[block].sums for block in metadata.blocks}
        num_a, pooled = len(metadata.samples[0]), self._pooled
        fisher, records = {block: _fisher(part) for block, part in sums.items()}, _records(self._blocks)
        counted = counted_of(*metadata.samples)
        shared = _shared(self._shared, len(metadata.layers), num_a if pooled else None, self._pairs)
        if not scores:
            shared = {name: {"mean": arrays["mean"]} for name, arrays in shared.items()}
        means = self._mean(scores) if scores else {block: self._blocks[block].means for block in metadata.blocks}
        task_a, task_b = metadata.tasks
        return Heatmap(
            task_a,
            task_b,
            layers=tuple(layer.layer for layer in metadata.layers),
            heads=metadata.query_heads,
            kv_heads=metadata.kv_heads,
            groups=np.array([layer.group for layer in metadata.layers], np.int64),
            samples_a=metadata.samples[0],
            samples_b=metadata.samples[1],
            mean=means,
            present={block: ~np.isnan(column(part, "count")) for block, part in sums.items()},
            fisher=fisher,
            cross=(cross_of_pooled(scores, num_a) if pooled else scores) if scores else None,
            pooled=scores if pooled and scores else None,
            shared=shared,
            attributes={**metadata.attributes, "warnings": _warnings(metadata, fisher, self._without)},
            influences=None if records is None else {b: of_samples(found) for b, found in records.items()},
            own_shares=_own_shares(self._blocks, num_a) if pooled and scores else None,
            effects=None if records is None else {b: untested_effects(found, counted) for b, found in records.items()},
        )


def assemble(
    metadata: HeatmapMetadata,
    layers: Iterable[tuple[int, LayerPartial]],
    *,
    pooled: bool | None = None,
    folder: Path | None = None,
) -> Heatmap:
    """Put whole layers (summed over ranks) of two tasks together as a heatmap.

    Args:
        metadata: Axes, samples and provenance.
        layers: Layer numbers with their sums, each of the metadata's once, in any order; one is held at a time.
        pooled: Whether the sums are among all pooled samples; as the metadata says by default.
        folder: Where scores wait that are too large for memory; the system's temporary folder by default.

    Raises:
        QkovError: for a layer, or a head of it, that is missing.
    """
    assembly = Assembly(metadata, pooled=pooled, folder=folder)
    for number, part in layers:
        assembly.take(number, part)
    return assembly.heatmap()


def _records(blocks: Mapping[str, _Block]) -> dict[str, np.ndarray] | None:
    """Block -> records [layer, head, optimizer, sums and N]; None where effects were left out."""
    found = {block: of_block.influences for block, of_block in blocks.items()}
    return found if all(array.shape[-1] for array in found.values()) else None


def _own_shares(blocks: Mapping[str, _Block], num_a: int) -> dict[str, np.ndarray] | None:
    """Block -> what samples do through the Fisher, [layer, head, KNOWN, N]; None where that was left out."""
    found = {block: of_block.own_shares for block, of_block in blocks.items()}
    return (
        {block: known(of, num_a) for block, of in found.items()} if all(of.shape[-1] for of in found.values()) else None
    )


def _warnings(
    metadata: HeatmapMetadata, fisher: Mapping[str, Mapping[str, np.ndarray]], without: WithoutGradient
) -> list[str]:
    return [
        *metadata.attributes.get("warnings", ()),  # known before the first batch: of the model, of the samples
        *warnings_of(metadata, fisher),
        *without.warnings(metadata.tasks, metadata.samples),
    ]


def block_of(part: LayerPartial, layer: LayerAxes, block: str) -> BlockPartial:
    """One block of a layer, with all of its heads.

    Raises:
        QkovError: where some are missing.
    """
    found = part.blocks[block].heads.tolist() if block in part.blocks else []
    if tuple(found) != tuple(layer.heads[block]):
        raise QkovError(
            f"merge: layer {layer.layer}, block {block}",
            expected=f"scores of heads {list(layer.heads[block])}",
            got=f"{found}",
            remedy="A rank's partial scores are missing; run again with output.resume: true.",
        )
    return part.blocks[block]


def _check_all(metadata: HeatmapMetadata, seen: set[int]) -> None:
    if missing := [layer.layer for layer in metadata.layers if layer.layer not in seen]:
        raise QkovError(
            "merge",
            expected=f"{len(metadata.layers)} scored layers",
            got=f"no scores of layers {missing}",
            remedy="Run again with output.resume: true to score what is missing.",
        )


def _fisher(sums: FisherSums) -> dict[str, np.ndarray]:
    """What a heatmap says of I, from sums [layer, head, columns]."""
    total, count = column(sums, "sum"), column(sums, "count")
    share_a = np.divide(column(sums, "sum_of_a"), total, out=np.full_like(total, np.nan), where=total > 0)
    below = column(sums, "num_ridge_above") / count
    return dict(zip(FISHER_KEYS, (total / count, column(sums, "min"), below, share_a), strict=True))


def _shared(
    found: Mapping[int, Floats], num_layers: int, num_a: int | None, pairs: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """O's bias of each layer (NaN where a layer has none), which belongs to no head."""
    if not found:
        return {}
    missing = np.full_like(next(iter(found.values())), np.nan)
    stacked: Sequence[Floats] = [found.get(place, missing) for place in range(num_layers)]
    cross = np.stack(stacked)
    if num_a is not None:
        cross = cross[:, :num_a, num_a:]
    (mean,) = mean_over_pairs({SHARED_O_BIAS: cross[:, None]}, pairs).values()
    return {SHARED_O_BIAS: {"cross": cross, "mean": mean[:, 0]}}


_LISTED = 5  # samples in a warning


@dataclass
class WithoutGradient:
    """Samples whose gradient is zero in heads where others have one: they take no part in the scores there.

    Attributes:
        heads: Pooled number of such a sample -> how many heads, and the first of them.
        num_heads: Heads seen.
    """

    heads: dict[int, tuple[int, str]] = field(default_factory=dict)
    num_heads: int = 0

    def see(self, layer: int, block: str, part: BlockPartial, *, pooled: bool) -> None:
        """Look at one block's scores, summed over ranks: a sample without gradient has zeros with all others.

        Args:
            layer: The layer's number.
            block: The block.
            part: Its scores, [heads, N, N] of all samples if ``pooled``, else [heads, A, B].
            pooled: Which of the two.
        """
        self.num_heads += len(part.heads)
        scores = part.scores[part.scores.any(axis=(1, 2))]
        heads = part.heads[part.scores.any(axis=(1, 2))].tolist()
        silent = ~scores.any(axis=2)
        if not pooled:
            silent = np.concatenate([silent, ~scores.any(axis=1)], axis=1)
        for head, sample in np.argwhere(silent).tolist():
            count, first = self.heads.get(sample, (0, f"{block}, layer {layer}, head {heads[head]}"))
            self.heads[sample] = (count + 1, first)

    def warnings(self, tasks: Sequence[str], samples: Sequence[SampleTable]) -> list[str]:
        """One sentence that names them, those of most heads first; none where every sample has gradients."""
        if not self.heads:
            return []
        names = [
            f"task {task!r}, sample {name!r}" for task, table in zip(tasks, samples, strict=True) for name in table.ids
        ]
        ranked = sorted(self.heads, key=lambda number: (-self.heads[number][0], number))
        listed = [
            f"{names[number]} in {self.heads[number][0]} of {self.num_heads} heads (first {self.heads[number][1]})"
            for number in ranked[:_LISTED]
        ]
        more = f"; {len(ranked) - _LISTED} samples more" if len(ranked) > _LISTED else ""
        return [
            f"gradients that are exactly zero, and so are the scores: {'; '.join(listed)}{more}. "
            "Check these samples, and their loss if the model is in half precision."
        ]
