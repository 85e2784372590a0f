"""Rounds and sweeps: every rank's layers once, in order, in as few passes as fit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkov_dist.errors import QkovError
from qkov_dist.scoring.schedule import gpu_budget, layers_of, make_rounds, make_sweeps

LAYERS = st.lists(st.lists(st.integers(0, 20), unique=True, max_size=8).map(sorted), min_size=1, max_size=5)


@given(LAYERS)
def test_every_rank_goes_through_its_layers_in_order(by_rank):
    rounds = make_rounds(by_rank)
    for rank, layers in enumerate(by_rank):
        assert [turn[rank] for turn in rounds if turn[rank] is not None] == layers
    assert len(rounds) == max(map(len, by_rank))
    assert layers_of(rounds) == tuple(sorted({layer for layers in by_rank for layer in layers}))


def test_ranks_that_own_different_layers_work_at_the_same_time():
    assert make_rounds([[0, 1, 2], [2, 3]]) == [(0, 2), (1, 3), (2, None)]


@given(LAYERS, st.integers(0, 40))
def test_sweeps_are_consecutive_rounds_that_fit(by_rank, budget):
    rounds, sizes = make_rounds(by_rank), {layer: layer + 1 for layer in range(21)}

    def need(sweep):
        return sum(sizes[layer] for layer in layers_of(sweep))

    if any(need([turn]) > budget for turn in rounds):
        with pytest.raises(QkovError, match="factor_memory_mb"):
            make_sweeps(rounds, sizes, budget)
        return
    sweeps = make_sweeps(rounds, sizes, budget)
    assert [turn for sweep in sweeps for turn in sweep] == rounds
    assert all(need(sweep) <= budget for sweep in sweeps)
    for sweep, after in pairwise(sweeps):
        assert need([*sweep, after[0]]) > budget


def test_what_goes_to_a_gpu_by_whole_buffers_may_leave_a_layer_of_room():
    sizes = {0: 30, 1: 50, 2: 20}
    assert gpu_budget(100, sizes) == 100
    assert gpu_budget(99, sizes) == 49
    assert gpu_budget(40, sizes) == 0
    rounds = [(0,), (1,), (2,)]
    assert len(make_sweeps(rounds, sizes, 0, gpu_budget(100, sizes))) == 1
    assert len(make_sweeps(rounds, sizes, 31, gpu_budget(99, sizes))) == 2
    with pytest.raises(QkovError, match=r"compute\.factor_gpu_mb \+ compute\.factor_memory_mb"):
        make_sweeps(rounds, sizes, 10, 1)
