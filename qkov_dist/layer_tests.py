"""The tests of layers, as ranks hold, send and join them: each head is tested where its scores are.

    mine = LayerTests.joined(layer_tests(design, layer, scores[layer], heads, ids) for layer in layers)
    tests = LayerTests.joined(map(LayerTests.from_json, world.gather(mine.to_json())))

holds on every rank what one process would have found, and a rank sends one ``max_z`` for each statistic. ``heads`` may
be any of a layer's heads; a head's numbers do not depend on those that it is tested with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .errors import QkovError
from .head_tests import Design, HeadTests, MaxZ, Statistic, head_tests, join, largest
from .sample_checks import refuse_not_finite


class BlockTests(NamedTuple):
    """The tests of one layer's heads in one block; every array runs along ``heads``, the model's numbers."""

    heads: tuple[int, ...]
    statistics: Mapping[Statistic, HeadTests]


@dataclass(frozen=True)
class LayerTests:
    """The tests of some layers, or of none.

    Attributes:
        layers: Layer number -> block -> the tests of its heads.
        max_z: The largest z of all these heads.
    """

    layers: Mapping[int, Mapping[str, BlockTests]]
    max_z: MaxZ

    @staticmethod
    def joined(parts: Iterable[LayerTests]) -> LayerTests:
        """The tests of all parts' heads; a layer may be spread over several parts.

        Raises:
            QkovError: for a head that two parts have.
        """
        kept = tuple(parts)
        layers: dict[int, dict[str, BlockTests]] = {}
        for part in kept:
            for layer, blocks in part.layers.items():
                known = layers.setdefault(layer, {})
                for block, tests in blocks.items():
                    known[block] = (
                        _both(f"layer {layer}, block {block}", known[block], tests) if block in known else tests
                    )
        return LayerTests(layers, largest(part.max_z for part in kept))

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        layers = {
            str(layer): {
                block: {"heads": list(of.heads), **{name: tests.to_json() for name, tests in of.statistics.items()}}
                for block, of in blocks.items()
            }
            for layer, blocks in self.layers.items()
        }
        return {"layers": layers, "max_z": {name: max_z.tolist() for name, max_z in self.max_z.items()}}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> LayerTests:
        """What ``to_json`` made JSON of."""
        layers = {
            int(layer): {block: _block_from_json(of) for block, of in blocks.items()}
            for layer, blocks in raw["layers"].items()
        }
        return LayerTests(layers, {name: np.array(max_z, np.float64) for name, max_z in raw["max_z"].items()})


def _both(where: str, first: BlockTests, second: BlockTests) -> BlockTests:
    if twice := sorted(set(first.heads) & set(second.heads)):
        remedy = "Let one rank test each head."
        raise QkovError(f"statistics, {where}, head {twice[0]}", expected="one test", got="two", remedy=remedy)
    statistics = {name: join([tests, second.statistics[name]]) for name, tests in first.statistics.items()}
    return BlockTests((*first.heads, *second.heads), statistics)


def _block_from_json(raw: Mapping[str, Any]) -> BlockTests:
    statistics = {name: HeadTests.from_json(tests) for name, tests in raw.items() if name != "heads"}
    return BlockTests(tuple(raw["heads"]), statistics)  # type: ignore[arg-type]


def layer_tests(
    design: Design,
    layer: int,
    scores: Mapping[str, Tensor],
    heads: Mapping[str, Sequence[int]],
    sample_ids: Sequence[str],
) -> LayerTests:
    """Test the heads of one layer.

    Args:
        design: The same for all layers and ranks.
        layer: Its number.
        scores: Block -> [heads, N, N] among all samples, A's first; all NaN for an absent head. Left alone.
        heads: Block -> the numbers of these heads; there may be none.
        sample_ids: Ids of the N samples, for errors.

    Raises:
        QkovError: for a score of a present head that is not finite.
    """
    there = {block: of_block for block, of_block in scores.items() if len(heads[block])}
    for block, of_block in there.items():
        where = f"layer {layer}, block {block}"
        refuse_not_finite(of_block, where, heads[block], sample_ids, sample_ids, with_absent=True)
    tests, max_z = head_tests(there, design)
    return LayerTests({layer: {block: BlockTests(tuple(heads[block]), tests[block]) for block in there}}, max_z)
