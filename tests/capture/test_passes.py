"""Who runs which samples, in which batches: each sample once; as many passes on each rank that needs the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import mixed_samples

from qkov_dist.capture.passes import DealtTask, TaskPasses


@given(
    num=st.integers(1, 9),
    groups=st.integers(1, 5),
    context=st.integers(1, 3),
    batch_tokens=st.sampled_from([1, 20, 1000]),
)
@pytest.mark.parametrize("gathers_weights", [False, True])
def test_every_sample_counts_once_and_passes_wait_for_no_rank(gathers_weights, num, groups, context, batch_tokens):
    """Ranks that share tokens make the same passes; a sample is that of one of them."""
    dp_size = groups * context
    samples = mixed_samples(num, 50, seed=num)
    dealt = DealtTask(samples, "causal", dp_size)
    passes = TaskPasses(
        dealt, batch_tokens, gathers_weights, [sample.id for sample in samples], first=10, context=context
    )
    by_rank = [passes.on(rank) for rank in range(dp_size)]
    counted = [
        (n, one.owner + rank)
        for rank in range(0, dp_size, context)
        for one in by_rank[rank]
        if one.counts
        for n in one.batch.samples
    ]
    assert sorted(counted) == sorted((10 + n, rank) for rank, of_rank in enumerate(dealt.numbers) for n in of_rank)
    assert [n for n, _ in sorted(counted)] == list(range(10, 10 + num))
    for rank, of_rank in enumerate(by_rank):
        shapes = [
            [(one.batch.samples, one.counts, one.owner) for one in run]
            for run in (of_rank, by_rank[rank // context * context])
        ]
        assert shapes[0] == shapes[1]
    assert sorted(length for rank in range(dp_size) for length in dealt.lengths_on(rank)) == sorted(dealt.lengths)
    if gathers_weights:
        assert len({len(of_rank) for of_rank in by_rank}) == 1
    else:
        assert all(one.counts for of_rank in by_rank for one in of_rank)
