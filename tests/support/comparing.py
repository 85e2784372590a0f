"""How near results are to each other: the engine's blocks, heatmaps in memory, heatmaps bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import changes
from qkov_dist.scoring.engine import BlockScores
from qkov_dist.scoring.fisher_sums import no_sums
from qkov_dist.scoring.influence_records import OPTIMIZERS, no_influences
from qkov_dist.scoring.own_share_records import no_shares


def closeness(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation as a share of the block's largest score."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


TOLERANCE = 1e-3  # the bar for float32: a share of the block's largest score


def assert_close(got, expected, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys()
    for layer, blocks in expected.items():
        assert got[layer].keys() == blocks.keys()
        for block, scores in blocks.items():
            assert got[layer][block].heads == tuple(range(len(scores))), (layer, block)
            assert closeness(got[layer][block].scores, scores) < tolerance, (layer, block)


def as_blocks(heatmap):
    """A heatmap's native scores in the engine's form."""
    return {
        layer: {
            block: BlockScores(
                heads := heatmap.natives(block),
                torch.from_numpy(heatmap.cross[block][place].copy()),
                no_sums(len(heads)),
                no_influences(len(heads)),
                no_shares(len(heads)),
            )
            for block in heatmap.blocks
        }
        for place, layer in enumerate(heatmap.layers)
    }


SUMS_OF_EFFECTS = ("change", "standard_error", "curvature_a", "curvature_b", "own_a", "own_b")


def deviations(one, other) -> dict[str, float]:
    """Of scores, influences, and each effect: the largest deviation as a share of its block's largest.

    A step on oneself is rid of self-pairs by a sum that nearly cancels: its deviation is a share of the influences.
    """
    triples = [("scores", one.cross[b], other.cross[b], other.cross[b]) for b in other.blocks]
    for block in other.blocks:
        for place, optimizer in enumerate(OPTIMIZERS):
            both = [x.influences[block][:, :, place] for x in (one, other)]
            triples.append(("influences", *both, both[1]))
            mine, theirs = (_effects_of(x, block, optimizer) for x in (one, other))
            for name in SUMS_OF_EFFECTS:
                unit = both[1] if name.startswith("own") else theirs[name]
                triples.append((name, mine[name], theirs[name], unit))
    found: dict[str, float] = {}
    for name, ours, wanted, unit in triples:
        found[name] = max(found.get(name, 0.0), float(np.nanmax(np.abs(ours - wanted)) / np.nanmax(np.abs(unit))))
    return found


def _effects_of(heatmap, block: str, optimizer: str) -> dict[str, np.ndarray]:
    """A heatmap's effects, tested or not: what tests add is no sum, but follows from influences."""
    change = changes(heatmap.influences[block][:, :, OPTIMIZERS.index(optimizer)], heatmap.counted)
    stored = heatmap.effects[block][optimizer]
    return {"change": change.value, "standard_error": change.standard_error, **stored}


def deviation(one, other) -> float:
    """The largest of them."""
    return max(deviations(one, other).values())


def assert_identical(one, other) -> None:
    """Bit for bit, but for where it was written."""
    for block in one.blocks:
        np.testing.assert_array_equal(one.cross[block], other.cross[block])
        np.testing.assert_array_equal(one.mean[block], other.mean[block])
        np.testing.assert_array_equal(one.influences[block], other.influences[block])
        if one.own_shares is not None:
            np.testing.assert_array_equal(one.own_shares[block], other.own_shares[block])
        for optimizer, arrays in one.effects[block].items():
            for key, values in arrays.items():
                np.testing.assert_array_equal(values, other.effects[block][optimizer][key])
        for key, values in one.fisher[block].items():
            np.testing.assert_array_equal(values, other.fisher[block][key])
        for key, values in one.statistics["overlap"][block].items():
            np.testing.assert_array_equal(values, other.statistics["overlap"][block][key])
    np.testing.assert_array_equal(one.samples_a.losses, other.samples_a.losses)
    assert one.run_id == other.run_id


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, dict) or left is None:
        assert type(left) is type(right)
        assert left is None or left.keys() == right.keys()
        for key in left or ():
            assert_same(left[key], right[key])
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right
        assert type(left) is type(right)


def assert_same_heatmap(left: Heatmap, right: Heatmap) -> None:
    assert isinstance(right, Heatmap)
    for name in left.__dataclass_fields__:
        mine, theirs = getattr(left, name), getattr(right, name)
        if name.startswith("samples_"):
            mine, theirs = vars(mine), vars(theirs)
        assert_same(mine, theirs)
