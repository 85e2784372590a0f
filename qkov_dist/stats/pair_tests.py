"""Layers tested as they come, every pair of tasks, on threads of their own while the caller brings the next layer.

Layers come when their parts are added up, or, of those that one GPU has scored whole, at once, from where their scores
were formed. A pair of many tasks is tested as two tasks are, from its part of the scores of all. So many scores wait
for their tests at a time that threads have work while a layer is read, added up and put in its place. Each rank tests
the heads that it adds up; rank 0 gets the tests of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np
import torch

from qkov_dist.config import FEWEST_TASKS
from qkov_dist.distributed.world import World
from qkov_dist.memory import UnlessShort
from qkov_dist.results.metadata import HeatmapMetadata
from qkov_dist.results.partial_schema import LayerPartial
from qkov_dist.results.task_pairs import of_pair, scores_of_pair
from qkov_dist.scoring.own_share_records import known

from .head_tests import CPU, Design, LayerTests, layer_tests, threads_that_test
from .statistics import QKOVStatistics

Both = tuple[int, int]  # two of many tasks, by number
# Fewer of scores that wait for their tests; on a GPU, which is not to wait for the host.
IN_HAND_BYTES, GPU_IN_HAND_BYTES = 16 << 20, 64 << 20
Scores = Mapping[str, torch.Tensor]  # block -> [heads, N, N]


def tests_at_once(device: torch.device) -> bool:
    """Whether layers are tested while others are scored: on a GPU; on a CPU both would only share its cores."""
    return device.type == "cuda"


class PairTests:
    """Takes layers, one after another, and has them tested; a context manager that ends its threads.

    Args:
        statistics: The tests; None: nothing is tested.
        of_pairs: Every pair of tasks by number, with its own metadata.
        device: Where heads are tested.
    """

    def __init__(
        self, statistics: QKOVStatistics | None, of_pairs: Mapping[Both, HeatmapMetadata], device: torch.device = CPU
    ) -> None:
        self._of_pairs, self._device = of_pairs, device
        self.designs = {} if statistics is None else designs_of(statistics, of_pairs, device)
        self._tested: dict[Both, list[LayerTests]] = {both: [] for both in self.designs}
        self._waiting: deque[tuple[Both, int, Callable[[], LayerTests]]] = deque()  # and the bytes of their scores
        self._threads = ExitStack()
        self._taken: set[int] = set()

    def __enter__(self) -> PairTests:
        self._submit = self._threads.enter_context(threads_that_test(self._device))
        return self

    def __exit__(self, *raised: object) -> None:
        self._threads.close()

    def take(self, layer: int, part: LayerPartial, sizes: tuple[int, ...], there: Scores | None = None) -> None:
        """Have a layer tested; returns while it is.

        Args:
            layer: Its number.
            part: Sums over all ranks of the heads that this rank tests, among all pooled samples.
            sizes: Samples of each task.
            there: The same scores where they are tested, if they are there already.

        Raises:
            QkovError: for a score of a present head that is not finite.
        """
        self._taken.add(layer)
        for both in self.designs:
            self._begin(both, layer, part, sizes, there)
            self._wait(IN_HAND_BYTES if there is None else GPU_IN_HAND_BYTES)  # a larger pair at once

    def taken(self, world: World) -> frozenset[int]:
        """Layers whose tests were begun on any rank; every rank calls this alike."""
        return frozenset(layer for theirs in world.all_gather(sorted(self._taken)) for layer in theirs)

    def _begin(self, both: Both, layer: int, part: LayerPartial, sizes: tuple[int, ...], there: Scores | None) -> None:
        """Begin the tests of a pair; from the host's scores, where there is no room beside those that are there."""
        if there is not None:
            with UnlessShort():
                self._begin_from(both, layer, part, sizes, there)
                return
        self._begin_from(both, layer, part, sizes, None)

    def _begin_from(
        self, both: Both, layer: int, part: LayerPartial, sizes: tuple[int, ...], there: Scores | None
    ) -> None:
        of_two = part if len(sizes) == FEWEST_TASKS else of_pair(part, sizes, *both, pooled=True)
        if there is not None and of_two is not part:
            there = {block: scores_of_pair(of_block, sizes, *both) for block, of_block in there.items()}
        ids = [sample for table in self._of_pairs[both].samples for sample in table.ids]
        scores = {block: torch.from_numpy(np.ascontiguousarray(found.scores)) for block, found in of_two.blocks.items()}
        heads = {block: tuple(found.heads.tolist()) for block, found in of_two.blocks.items()}
        of_blocks, shares = of_two.blocks, None
        if all(found.own_shares.size for found in of_blocks.values()):
            num_a = sizes[both[0]]
            shares = {block: torch.from_numpy(known(found.own_shares, num_a)) for block, found in of_blocks.items()}
        wait = layer_tests(self._submit, self.designs[both], layer, scores, heads, ids, shares, there)
        self._waiting.append((both, sum(of_block.nbytes for of_block in scores.values()), wait))

    def _wait(self, left: int) -> None:
        """Wait for the tests that were begun first, until those of fewer bytes are left."""
        in_hand = sum(size for _, size, _ in self._waiting)
        while self._waiting and in_hand >= left:
            both, size, wait = self._waiting.popleft()
            self._tested[both].append(wait())
            in_hand -= size

    def of_all_ranks(self, world: World) -> dict[Both, LayerTests]:
        """The tests of every pair on rank 0, and of none elsewhere; every rank calls this alike, after all layers."""
        self._wait(0)
        mine = [LayerTests.joined(of_layers) for of_layers in self._tested.values()]
        if world.size == 1 or not mine:
            return dict(zip(self.designs, mine, strict=True))
        gathered = world.all_gather([tests.to_json() for tests in mine])
        if world.rank:
            return {}
        return {
            both: LayerTests.joined(LayerTests.from_json(of_rank[number]) for of_rank in gathered)
            for number, both in enumerate(self.designs)
        }


def designs_of(
    statistics: QKOVStatistics, of_pairs: Mapping[Both, HeatmapMetadata], device: torch.device = CPU
) -> dict[Both, Design]:
    """The design of each pair's tests: one for all pairs of as many samples without copies, as it is then the same."""
    known: dict[tuple[object, ...], Design] = {}
    found = {}
    for both, metadata in of_pairs.items():
        contents = [content for table in metadata.samples for content in table.contents]
        has_copies = len({*contents} - {""}) < len([content for content in contents if content])
        key = (*metadata.sizes, *(contents if has_copies else ()))
        if key not in known:
            names = statistics.names(str(metadata.attributes["score"]))
            num_a, num_b = metadata.sizes
            known[key] = statistics.design(num_a, num_b, names, contents, device)
        found[both] = known[key]
    return found
