"""Who runs which samples, in which batches: each sample once; as many passes on each rank that needs the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import mixed_samples

from qkov_dist.capture.passes import DealtTask, TaskPasses


@given(num=st.integers(1, 9), dp_size=st.integers(1, 5), batch_tokens=st.sampled_from([1, 20, 1000]))
@pytest.mark.parametrize("gathers_weights", [False, True])
def test_every_sample_counts_once_and_passes_wait_for_no_rank(gathers_weights, num, dp_size, batch_tokens):
    samples = mixed_samples(num, 50, seed=num)
    dealt = DealtTask(samples, "causal", dp_size)
    passes = TaskPasses(dealt, batch_tokens, gathers_weights, [sample.id for sample in samples], first=10)
    by_rank = [passes.on(rank) for rank in range(dp_size)]
    counted = [n for of_rank in by_rank for batch, counts in of_rank if counts for n in batch.samples]
    assert sorted(counted) == list(range(10, 10 + num))
    assert sorted(length for rank in range(dp_size) for length in dealt.lengths_on(rank)) == sorted(dealt.lengths)
    if gathers_weights:
        assert len({len(of_rank) for of_rank in by_rank}) == 1
    else:
        assert all(counts for of_rank in by_rank for _, counts in of_rank)
