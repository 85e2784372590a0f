"""How near results are to each other: the engine's blocks, heatmaps in memory, heatmaps bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.scoring.engine import BlockScores
from qkov_dist.scoring.fisher_sums import no_sums
from qkov_dist.scoring.influence_records import OPTIMIZERS, no_influences


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
            )
            for block in heatmap.blocks
        }
        for place, layer in enumerate(heatmap.layers)
    }


def deviation(one, other) -> float:
    """Largest deviation of any score, or of any influence, as a share of its block's largest."""
    pairs = [(one.cross[b], other.cross[b]) for b in other.blocks]
    pairs += [
        (one.influences[b][:, :, o], other.influences[b][:, :, o]) for b in other.blocks for o in range(len(OPTIMIZERS))
    ]
    return max(float(np.nanmax(np.abs(mine - theirs)) / np.nanmax(np.abs(theirs))) for mine, theirs in pairs)


def assert_identical(one, other) -> None:
    """Bit for bit, but for where it was written."""
    for block in one.blocks:
        np.testing.assert_array_equal(one.cross[block], other.cross[block])
        np.testing.assert_array_equal(one.mean[block], other.mean[block])
        np.testing.assert_array_equal(one.influences[block], other.influences[block])
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
