"""What tests cost a rank: operations of its heads' permutations and intervals, and the bytes that adding up takes.

Operations are those of the matrix products, which nearly all of the time goes to.

    relabelled   2 P operations for each element of a head's scores from its block of rows' diagonal to the right, for P
                 labellings
    jackknife    4 N^2 operations for each of the labellings that are looked at without each sample
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb

from qkov_dist.layout.heads import BLOCKS
from qkov_dist.memory import IN_MEMORY_BYTES
from qkov_dist.stats.jackknife import LABELLINGS

from .scoring_cost import ScoringCost

TEST_BYTES = 40 * 2**20  # a few dozen arrays of a MiB while heads are tested
ROWS = 64  # of a head's scores in one product, at most


@dataclass(frozen=True, eq=False)
class StatisticsCost:
    """Counts for one way to divide the heads."""

    scoring: ScoringCost

    def flops(self, rank: int) -> int:
        """Operations of the tests of a rank's heads."""
        return self.scoring.num_tested(rank) * self._of_a_head

    def bytes(self, rank: int) -> int:
        """Bytes of labels, of one layer's scores while they are added up and tested, and on rank 0 of the heatmap."""
        heatmap = 0 if rank else self._heatmap
        if not self.scoring.work.config.statistics.enabled:
            return self._layer + heatmap
        labels = 8 * sum(self.scoring.work.num_samples) * (self._labellings + self._left_out)
        return labels + TEST_BYTES + self._layer + heatmap

    @cached_property
    def _of_a_head(self) -> int:
        """Operations of one head's tests."""
        config, (num_a, num_b) = self.scoring.work.config, self.scoring.work.num_samples
        if not config.statistics.enabled:
            return 0
        num = num_a + num_b
        return 2 * triangle(num) * self._labellings + 4 * num * num * self._left_out

    @property
    def _labellings(self) -> int:
        """Labellings, the observed one among them: all that there are, or those drawn."""
        num_a, num_b = self.scoring.work.num_samples
        every, drawn = comb(num_a + num_b, num_a), self.scoring.work.config.statistics.permutations
        return every if every <= drawn else drawn + 1

    @property
    def _left_out(self) -> int:
        return 1 + min(self._labellings - 1, LABELLINGS)

    @cached_property
    def _layer(self) -> int:
        """Bytes of a layer's scores on a rank that adds them up: what comes, twice while it is unpacked, and sums."""
        by_rank, most = self.scoring.by_rank, 0
        for layer, layer_work in by_rank[0].items():
            heads = sum(map(len, layer_work.every_head.values()))
            if len(by_rank) == 1:
                most = max(most, heads * self.scoring.matrix)
                continue
            parts = sum(len(found) for rank in by_rank for found in rank[layer].heads.values())
            most = max(most, -(-(2 * parts + heads) // len(by_rank)) * self.scoring.matrix)
        return most

    @cached_property
    def _heatmap(self) -> int:
        """Bytes of the heatmap's scores in memory; large blocks wait in a file."""
        work = self.scoring.work
        num_a, num_b = work.num_samples
        pairs = (num_a + num_b) ** 2 if work.config.output.pairs == "all" else num_a * num_b
        cells = (self.scoring.cells.get(block, 0) for block in BLOCKS)
        return sum(min(n * pairs * work.scoring.itemsize, IN_MEMORY_BYTES) for n in cells)


def triangle(size: int) -> int:
    """Elements right of the block diagonal of a matrix, its blocks of rows of about one height."""
    height = -(-size // -(-size // ROWS))
    return sum(min(height, size - start) * (size - start) for start in range(0, size, height))
