"""What tests cost a rank: operations of its heads' permutations and intervals, and the bytes that adding up takes.

Operations are those of the matrix products, which nearly all of the time goes to.

    relabelled   2 P operations for each element of a head's scores from its block of rows' diagonal to the right, for P
                 labellings
    jackknife    4 N^2 operations for each of the labellings that are looked at without each sample

with N the samples of two tasks; of more than two every pair is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb

from qkov_dist.layout.heads import BLOCKS
from qkov_dist.memory import IN_MEMORY_BYTES
from qkov_dist.stats.jackknife import LABELLINGS
from qkov_dist.stats.pair_tests import GPU_IN_HAND_BYTES, IN_HAND_BYTES

from .scoring_cost import ScoringCost

OF_LABELLINGS, OF_LEFT_OUT = (
    40,
    10,
)  # arrays of float64 [heads, labellings], and [heads, N, those looked at without each]
TEST_BYTES = 40 * 2**20 + IN_HAND_BYTES  # a few dozen arrays of a MiB while heads are tested, and what waits for it
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
        kinds = {*self.scoring.work.sizes_of_pairs}  # pairs of as many samples share their labellings
        permutations = self.scoring.work.config.statistics.permutations
        numbers = [(n_a + n_b, _labellings(n_a, n_b, permutations)) for n_a, n_b in kinds]
        labels = sum(8 * num * (labellings + _left_out(labellings)) for num, labellings in numbers)
        return labels + TEST_BYTES + self._layer + heatmap

    def early(self, rank: int) -> int:
        """Bytes on a GPU of a layer's scores that stay there, and of their tests while the next layer is scored."""
        scoring, work = self.scoring, self.scoring.work
        layers = (layer for layer, owner in scoring.early.items() if owner == rank)
        heads = max((scoring.heads_of_blocks(scoring.by_rank[rank][layer]) for layer in layers), default=0)
        of_tests = 0
        for num_a, num_b in {*work.sizes_of_pairs}:
            num, labellings = num_a + num_b, _labellings(num_a, num_b, work.config.statistics.permutations)
            a_head = OF_LABELLINGS * labellings + OF_LEFT_OUT * num * _left_out(labellings) + 2 * num * num
            of_tests = max(of_tests, 8 * a_head)
        in_hand = min(GPU_IN_HAND_BYTES, len(scoring.early) * heads * scoring.matrix)
        return heads * (3 * scoring.matrix + of_tests) + in_hand

    @cached_property
    def _of_a_head(self) -> int:
        """Operations of one head's tests."""
        if not self.scoring.work.config.statistics.enabled:
            return 0
        flops = 0
        for num_a, num_b in self.scoring.work.sizes_of_pairs:
            flops += flops_of_a_head(num_a, num_b, self.scoring.work.config.statistics.permutations)
        return flops

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
        if work.config.has_many_tasks and work.config.output.pairs == "none":
            return 0
        pooled = work.config.output.pairs == "all"
        of_pairs = [(n_a + n_b) ** 2 if pooled else n_a * n_b for n_a, n_b in work.sizes_of_pairs]
        cells = [self.scoring.cells.get(block, 0) for block in BLOCKS]
        return sum(min(n * pairs * work.scoring.itemsize, IN_MEMORY_BYTES) for pairs in of_pairs for n in cells)


def flops_of_a_head(num_a: int, num_b: int, permutations: int) -> int:
    """Operations of one head's tests between two tasks of so many samples."""
    num, labellings = num_a + num_b, _labellings(num_a, num_b, permutations)
    return 2 * triangle(num) * labellings + 4 * num * num * _left_out(labellings)


def _labellings(num_a: int, num_b: int, permutations: int) -> int:
    """Labellings, the observed one among them: all that there are, or those drawn."""
    every = comb(num_a + num_b, num_a)
    return every if every <= permutations else permutations + 1


def _left_out(labellings: int) -> int:
    """Labellings that are looked at without each sample."""
    return 1 + min(labellings - 1, LABELLINGS)


def triangle(size: int) -> int:
    """Elements right of the block diagonal of a matrix, its blocks of rows of about one height."""
    height = -(-size // -(-size // ROWS))
    return sum(min(height, size - start) * (size - start) for start in range(0, size, height))
