"""Layers tested while others come: the same tests, and no more scores waiting than is told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qkov_dist.distributed.world import Alone
from qkov_dist.results.partial_schema import BlockPartial, LayerPartial
from qkov_dist.scoring.fisher_sums import no_sums
from qkov_dist.scoring.influence_records import no_influences
from qkov_dist.scoring.own_share_records import no_shares
from qkov_dist.stats import pair_tests
from qkov_dist.stats.head_tests import layer_tests
from qkov_dist.stats.statistics import QKOVStatistics

SIZES, NUM_LAYERS, HEADS = (4, 5, 4), 5, 2
PAIRS = {(0, 1): (4, 5), (0, 2): (4, 4), (1, 2): (5, 4)}


def layers() -> list[LayerPartial]:
    gradients = np.random.default_rng(0).normal(size=(NUM_LAYERS, HEADS, sum(SIZES), 6)) ** 2
    of_layers = gradients @ gradients.swapaxes(-1, -2)
    others = no_sums(HEADS, len(SIZES)), no_influences(HEADS), no_shares(HEADS)
    return [LayerPartial({"Q": BlockPartial(np.arange(HEADS), scores, *others)}, {}) for scores in of_layers]


def made(monkeypatch: pytest.MonkeyPatch, in_hand: int):
    """The tests of all pairs, and how many of them were waiting at a time at most."""
    waiting, most = set(), []

    def watched(*arguments):
        wait, number = layer_tests(*arguments), len(most)
        waiting.add(number)
        most.append(len(waiting))
        return lambda: waiting.discard(number) or wait()

    monkeypatch.setattr(pair_tests, "layer_tests", watched)
    monkeypatch.setattr(pair_tests, "IN_HAND_BYTES", in_hand)
    of_pairs = {both: metadata(*sizes) for both, sizes in PAIRS.items()}
    with pair_tests.PairTests(QKOVStatistics(n_permutations=30), of_pairs) as pairs:
        for number, part in enumerate(layers()):
            pairs.take(number, part, SIZES)
        return pairs.of_all_ranks(Alone()), max(most)


def metadata(num_a: int, num_b: int) -> SimpleNamespace:
    tables = [SimpleNamespace(ids=["s"] * num, contents=[""] * num) for num in (num_a, num_b)]
    return SimpleNamespace(samples=tables, sizes=(num_a, num_b), attributes={"score": "interference"})


def test_scores_that_wait_are_bounded_and_change_no_bit(monkeypatch):
    of_a_pair = 8 * HEADS * 9 * 9
    one, most_of_one = made(monkeypatch, 1)
    some, most_of_some = made(monkeypatch, 3 * of_a_pair)
    assert (most_of_one, most_of_some) == (1, 4)  # of (0, 2) scores are fewer
    assert list(one) == list(PAIRS)
    for both, tests in one.items():
        assert [*tests.layers] == [*range(NUM_LAYERS)]
        for layer, blocks in tests.layers.items():
            for name, of_heads in blocks["Q"].statistics.items():
                for key, array in of_heads.arrays.items():
                    np.testing.assert_array_equal(some[both].layers[layer]["Q"].statistics[name].arrays[key], array)
