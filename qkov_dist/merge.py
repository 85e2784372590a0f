"""Adding partial scores, and turning sums into a heatmap.

Scores and Fisher sums of disjoint rectangles add up, so the partials of all ranks, in any order, give the result of one
process. Normalisation (a mean over pairs, a mean of I, a share of elements) happens here, after the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .comm import World
from .engine import BlockScores
from .errors import QkovError
from .frame import Frame, FrameLayer
from .partial_schema import BlockPartial, Floats, LayerPartial
from .plan import SHARED_O_BIAS
from .results import FISHER_KEYS, Heatmap, cross_of_pooled, mean_over_pairs
from .slices import BLOCKS


def layer_partial(blocks: Mapping[str, BlockScores]) -> LayerPartial:
    """One layer's scores as they are stored: the heads of which this rank scored an element."""
    heads, shared = {}, {}
    for block, scored in blocks.items():
        touched = [place for place, sums in enumerate(scored.fisher) if sums.count]
        if touched and block in BLOCKS:
            heads[block] = _block_partial(scored, touched)
        elif touched:
            shared[block] = scored.scores[0].cpu().numpy()
    return LayerPartial(heads, shared)


def _block_partial(scored: BlockScores, touched: list[int]) -> BlockPartial:
    sums = [scored.fisher[place] for place in touched]
    return BlockPartial(
        np.array([scored.heads[place] for place in touched], np.int64),
        scored.scores[touched].cpu().numpy(),
        np.array([[f.total, f.count, f.minimum, f.below_ridge] for f in sums], np.float64),
    )


def add_layers(parts: Sequence[LayerPartial]) -> LayerPartial:
    """The sum of one layer's partials, head by head; parts may hold different heads."""
    blocks = {}
    for block in BLOCKS:
        of_block = [part.blocks[block] for part in parts if block in part.blocks]
        if of_block:
            blocks[block] = _add_blocks(of_block)
    names = {name for part in parts for name in part.shared}
    shared = {name: _add([part.shared[name] for part in parts if name in part.shared]) for name in sorted(names)}
    return LayerPartial(blocks, shared)


def add_over_ranks(part: LayerPartial, layer: FrameLayer, shape: tuple[int, int], world: World) -> LayerPartial:
    """One layer's sum over all ranks, on every rank; all of them call this alike.

    Args:
        part: What this rank scored; heads of which it owns nothing may be missing.
        layer: The layer's heads.
        shape: (samples in the role of i, samples in the role of j).
        world: The ranks.
    """
    if world.size == 1:
        return part
    blocks = {block: _block_over_ranks(part.blocks.get(block), heads, shape, world) for block, heads in _native(layer)}
    names = sorted({name for rank in world.gather(sorted(part.shared)) for name in rank})
    dtype = next((scores.dtype for scores in part.shared.values()), np.dtype(np.float32))
    shared = {name: world.sum(part.shared.get(name, np.zeros(shape, dtype))) for name in names}
    return LayerPartial(blocks, shared)


def _native(layer: FrameLayer) -> list[tuple[str, tuple[int, ...]]]:
    return [(block, tuple(layer.heads[block])) for block in BLOCKS if block in layer.heads]


def _block_over_ranks(
    part: BlockPartial | None, heads: tuple[int, ...], shape: tuple[int, int], world: World
) -> BlockPartial:
    wide = any(world.gather(part is not None and part.scores.dtype == np.float64))
    scores = np.zeros((len(heads), *shape), np.float64 if wide else np.float32)
    sums = np.zeros((len(heads), 4))
    sums[:, 2] = np.inf
    if part is not None:
        at = np.searchsorted(heads, part.heads)
        scores[at], sums[at] = part.scores, part.fisher_sums
    minimum = np.min(world.gather(sums[:, 2].tolist()), axis=0)
    sums[:, 2] = 0.0
    total = world.sum(sums)
    total[:, 2] = minimum
    return BlockPartial(np.array(heads, np.int64), world.sum(scores), total)


def _add(arrays: Sequence[Floats]) -> Floats:
    return arrays[0] if len(arrays) == 1 else np.sum(arrays, axis=0)


def _add_blocks(parts: Sequence[BlockPartial]) -> BlockPartial:
    if len(parts) == 1:
        return parts[0]
    heads = np.unique(np.concatenate([part.heads for part in parts]))
    scores = np.zeros((len(heads), *parts[0].scores.shape[1:]), parts[0].scores.dtype)
    sums = np.zeros((len(heads), 4))
    sums[:, 2] = np.inf
    for part in parts:
        at = np.searchsorted(heads, part.heads)
        scores[at] += part.scores
        minimum = np.minimum(sums[at, 2], part.fisher_sums[:, 2])
        sums[at] += part.fisher_sums
        sums[at, 2] = minimum
    return BlockPartial(heads, scores, sums)


def assemble(frame: Frame, layers: Mapping[int, LayerPartial]) -> Heatmap:
    """Put whole layers (summed over ranks) together as a heatmap.

    Args:
        frame: Axes, samples and provenance.
        layers: Summed partials by layer number; every layer of the frame.

    Raises:
        QkovError: for a layer, or a head of it, that is missing.
    """
    if missing := [layer.layer for layer in frame.layers if layer.layer not in layers]:
        raise QkovError(
            "merge",
            expected=f"{len(frame.layers)} scored layers",
            got=f"no scores of layers {missing}",
            remedy="Run again with output.resume: true to score what is missing.",
        )
    filled = {block: _fill(frame, layers, block) for block in frame.blocks}
    scores = {block: part[0] for block, part in filled.items()}
    num_a = len(frame.samples[0])
    cross = cross_of_pooled(scores, num_a) if frame.pooled else scores
    fisher = {block: _fisher(part[1]) for block, part in filled.items()}
    return Heatmap(
        *frame.tasks,
        layers=tuple(layer.layer for layer in frame.layers),
        heads=frame.query_heads,
        kv_heads=frame.kv_heads,
        groups=np.array([layer.group for layer in frame.layers], np.int64),
        samples_a=frame.samples[0],
        samples_b=frame.samples[1],
        mean=mean_over_pairs(cross),
        present={block: ~np.isnan(part[1][..., 1]) for block, part in filled.items()},
        fisher=fisher,
        cross=cross,
        pooled=scores if frame.pooled else None,
        shared=_shared(frame, layers),
        attributes={**frame.attributes, "warnings": warnings_of(frame, fisher)},
    )


def warnings_of(frame: Frame, fisher: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """What a reader of the scores must know: heads whose ridge dominates the Fisher, heads without any gradient."""
    found = []
    for block, parts in fisher.items():
        ridged = np.argwhere(parts["ridge_share"] > 0.5)
        if len(ridged):
            worst = tuple(ridged[np.argmax(parts["ridge_share"][tuple(ridged.T)])])
            found.append(
                f"{block}: lambda exceeds I on more than half of the elements of {len(ridged)} heads (most in layer "
                f"{frame.layers[worst[0]].layer}, head {frame.axis(block)[worst[1]]}: "
                f"{parts['ridge_share'][worst]:.0%}); scores there are those of an unweighted product. "
                "Try ridge.absolute=0 with a ridge.relative of 0.001 or less."
            )
        still = np.argwhere(parts["mean"] == 0)
        if len(still):
            names = ", ".join(f"{frame.layers[i].layer}.{frame.axis(block)[h]}" for i, h in still[:5])
            found.append(f"{block}: every gradient of {len(still)} heads is zero (layer.head {names}).")
    return found


def _fill(frame: Frame, layers: Mapping[int, LayerPartial], block: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores [layer, head, left, right] and Fisher sums [layer, head, 4] of a block; NaN where there is no head."""
    axis = frame.axis(block)
    parts = {
        place: _block_of(layers[layer.layer], layer, block)
        for place, layer in enumerate(frame.layers)
        if block in layer.heads
    }
    some = next(iter(parts.values())).scores
    scores = np.full((len(frame.layers), len(axis), *some.shape[1:]), np.nan, some.dtype)
    sums = np.full((len(frame.layers), len(axis), 4), np.nan)
    for place, part in parts.items():
        at = np.searchsorted(axis, part.heads)
        scores[place, at], sums[place, at] = part.scores, part.fisher_sums
    return scores, sums


def _block_of(part: LayerPartial, layer: FrameLayer, block: str) -> BlockPartial:
    found = part.blocks[block].heads.tolist() if block in part.blocks else []
    if tuple(found) != tuple(layer.heads[block]):
        raise QkovError(
            f"merge: layer {layer.layer}, block {block}",
            expected=f"scores of heads {list(layer.heads[block])}",
            got=f"{found}",
            remedy="A rank's partial scores are missing; run again with output.resume: true.",
        )
    return part.blocks[block]


def _fisher(sums: np.ndarray) -> dict[str, np.ndarray]:
    total, count, minimum, below = np.moveaxis(sums, -1, 0)
    return dict(zip(FISHER_KEYS, (total / count, minimum, below / count), strict=True))


def _shared(frame: Frame, layers: Mapping[int, LayerPartial]) -> dict[str, dict[str, np.ndarray]]:
    """O's bias of each layer (NaN where a layer has none), which belongs to no head."""
    found = {layer: part.shared[SHARED_O_BIAS] for layer, part in layers.items() if SHARED_O_BIAS in part.shared}
    if not found:
        return {}
    missing = np.full_like(next(iter(found.values())), np.nan)
    cross = np.stack([found.get(layer.layer, missing) for layer in frame.layers])
    if frame.pooled:
        num_a = len(frame.samples[0])
        cross = cross[:, :num_a, num_a:]
    return {SHARED_O_BIAS: {"cross": cross, "mean": cross.mean(axis=(1, 2), dtype=np.float64)}}
