"""Summed layers become a heatmap: axes, means, what was learnt of the Fisher, and what a reader has to be warned of.

Normalisation (a mean over pairs, a mean of I, a fraction of elements) happens here, after all sums. Layers come one at
a time; scores too large for memory wait in a scratch file.

What scores say of single samples: that one's gradients overflow, or that one has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qkov_dist.data.copies import different
from qkov_dist.errors import QkovError
from qkov_dist.memory import scratch_array
from qkov_dist.scoring.fisher_sums import FISHER_COLUMNS, FisherSums, column
from qkov_dist.scoring.influence_records import of_samples
from qkov_dist.scoring.tiles import SHARED_O_BIAS

from .effects import counted_samples, untested_effects
from .fisher_warnings import warnings_of
from .heatmap import Heatmap
from .heatmap_data import FISHER_KEYS, SampleTable, cross_of_pooled, mean_over_pairs
from .metadata import HeatmapMetadata, LayerAxes
from .partial_schema import BlockPartial, Floats, LayerPartial


class _Block:
    """Scores [layer, head, left, right], Fisher sums [layer, head, columns] and influences of one block; NaN where no
    head is.
    """

    def __init__(self, shape: tuple[int, int], some: BlockPartial, folder: Path | None) -> None:
        self.scores = scratch_array((*shape, *some.scores.shape[1:]), some.scores.dtype, folder)
        self.sums = np.full((*shape, len(FISHER_COLUMNS)), np.nan)
        self.influences = np.full((*shape, *some.influences.shape[1:]), np.nan)

    def filled(self) -> Floats:
        """The scores, when all layers are there."""
        self.scores[np.isnan(self.sums[..., 0])] = np.nan
        return self.scores


def assemble(
    metadata: HeatmapMetadata,
    layers: Iterable[tuple[int, LayerPartial]],
    *,
    pooled: bool | None = None,
    folder: Path | None = None,
) -> Heatmap:
    """Put whole layers (summed over ranks) together as a heatmap.

    Args:
        metadata: Axes, samples and provenance.
        layers: Layer numbers with their sums, each of the metadata's once, in any order; one is held at a time.
        pooled: Whether the sums are among all pooled samples; as the metadata says by default.
        folder: Where scores wait that are too large for memory; the system's temporary folder by default.

    Raises:
        QkovError: for a layer, or a head of it, that is missing.
    """
    pooled = metadata.pooled if pooled is None else pooled
    taken = _take_all(metadata, layers, folder, pooled=pooled)
    scores = {block: taken.blocks[block].filled() for block in metadata.blocks}
    sums = {block: taken.blocks[block].sums for block in metadata.blocks}
    num_a = len(metadata.samples[0])
    cross = cross_of_pooled(scores, num_a) if pooled else scores
    pairs = different(*(table.contents for table in metadata.samples))
    fisher = {block: _fisher(part) for block, part in sums.items()}
    records = _records(taken.blocks)
    counted = counted_samples(*(table.contents for table in metadata.samples))
    return Heatmap(
        *metadata.tasks,
        layers=tuple(layer.layer for layer in metadata.layers),
        heads=metadata.query_heads,
        kv_heads=metadata.kv_heads,
        groups=np.array([layer.group for layer in metadata.layers], np.int64),
        samples_a=metadata.samples[0],
        samples_b=metadata.samples[1],
        mean=mean_over_pairs(cross, pairs),
        present={block: ~np.isnan(column(part, "count")) for block, part in sums.items()},
        fisher=fisher,
        cross=cross,
        pooled=scores if pooled else None,
        shared=_shared(taken.shared, len(metadata.layers), num_a if pooled else None, pairs),
        attributes={**metadata.attributes, "warnings": _warnings(metadata, fisher, taken.without)},
        influences=None if records is None else {block: of_samples(of_block) for block, of_block in records.items()},
        effects=None if records is None else {b: untested_effects(found, counted) for b, found in records.items()},
    )


def _records(blocks: Mapping[str, _Block]) -> dict[str, np.ndarray] | None:
    """Block -> records [layer, head, optimizer, sums and N]; None where effects were left out."""
    found = {block: of_block.influences for block, of_block in blocks.items()}
    return found if all(array.shape[-1] for array in found.values()) else None


def _warnings(
    metadata: HeatmapMetadata, fisher: Mapping[str, Mapping[str, np.ndarray]], without: WithoutGradient
) -> list[str]:
    return [
        *metadata.attributes.get("warnings", ()),  # known before the first batch: of the model, of the samples
        *warnings_of(metadata, fisher),
        *without.warnings(metadata.tasks, metadata.samples),
    ]


@dataclass
class _Taken:
    """What has come of all layers: blocks, O's bias by the layer's place, and samples without gradient."""

    blocks: dict[str, _Block]
    shared: dict[int, Floats]
    without: WithoutGradient


def _take_all(
    metadata: HeatmapMetadata, layers: Iterable[tuple[int, LayerPartial]], folder: Path | None, *, pooled: bool
) -> _Taken:
    """Take one layer after another; all have to come."""
    places = {layer.layer: place for place, layer in enumerate(metadata.layers)}
    taken, seen = _Taken({}, {}, WithoutGradient()), set()
    for number, part in layers:
        for block, found in _take(taken.blocks, metadata, places[number], part, folder):
            taken.without.see(number, block, found, pooled=pooled)
        if SHARED_O_BIAS in part.shared:
            taken.shared[places[number]] = part.shared[SHARED_O_BIAS]
        seen.add(number)
    _check_all(metadata, seen)
    return taken


def _take(
    blocks: dict[str, _Block], metadata: HeatmapMetadata, place: int, part: LayerPartial, folder: Path | None
) -> Iterator[tuple[str, BlockPartial]]:
    """Put one layer's heads in their places; yields each block's."""
    layer = metadata.layers[place]
    for block in metadata.blocks:
        if block not in layer.heads:
            continue
        found, axis = _block_of(part, layer, block), metadata.axis(block)
        if block not in blocks:
            blocks[block] = _Block((len(metadata.layers), len(axis)), found, folder)
        at = np.searchsorted(axis, found.heads)
        blocks[block].scores[place, at], blocks[block].sums[place, at] = found.scores, found.fisher_sums
        blocks[block].influences[place, at] = found.influences
        yield block, found


def _block_of(part: LayerPartial, layer: LayerAxes, block: str) -> BlockPartial:
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
