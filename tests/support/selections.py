"""The awkward small heatmap with effects, which also says where its heads lie: K's in two rectangles each."""

from __future__ import annotations

import dataclasses
from typing import Any

from heatmaps import GROUPS, LAYERS, NUM_HEADS
from influences import heatmap_with_effects

from qkov_dist.results.heatmap import Heatmap


def heatmap_with_slices() -> Heatmap:
    heatmap = heatmap_with_effects()
    return dataclasses.replace(heatmap, attributes={**heatmap.attributes, "slices": made_slices()})


def made_slices() -> list[dict[str, Any]]:
    found = []
    for layer, group, num_heads in zip(LAYERS, GROUPS.tolist(), NUM_HEADS.tolist(), strict=True):
        for block in "QKVO":
            if (block, layer) == ("V", 7):
                continue
            num = num_heads if block in "QO" else num_heads // group
            bands = [[0, num, 0, 8]] if block != "K" else [[0, num, 0, 4], [0, num, 4 * num, 4]]
            shape = [48, 8 * num] if block == "O" else [8 * num, 48]
            name = f"model.layers.{layer}.self_attn.{block.lower()}_proj.weight"
            found.append(
                {"layer": layer, "parameter": name, "shape": shape, "transposed": False, "heads": {block: bands}}
            )
    return found
