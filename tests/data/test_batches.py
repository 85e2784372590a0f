from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import mixed_samples

from qkov_dist.data.batches import make_batches, num_targets, sequence
from qkov_dist.data.samples import IGNORED, Sample


def sample(ids, labels) -> Sample:
    return Sample("x", np.array(ids), np.array(labels), "")


def test_causal_targets_are_shifted_and_what_cannot_matter_is_cut():
    got = sequence(sample([5, 6, 7, 8, 9], [-100, 6, -100, 8, -100]), "causal")
    assert got.input_ids.tolist() == [5, 6, 7]
    assert got.targets.tolist() == [6, IGNORED, 8]


def test_masked_targets_are_not():
    got = sequence(sample([5, 6, 7], [5, -100, -100]), "masked")
    assert (got.input_ids.tolist(), got.targets.tolist()) == ([5, 6, 7], [5, IGNORED, IGNORED])


@given(num=st.integers(1, 20), tokens=st.integers(1, 60), seed=st.integers(0, 1000))
def test_every_sample_is_in_exactly_one_batch_with_its_own_tokens(num, tokens, seed):
    samples = mixed_samples(num, 50, seed=seed)
    batches = list(
        make_batches(
            samples, names=[s.id for s in samples], numbers=range(3, 3 + num), batch_tokens=tokens, objective="causal"
        )
    )
    assert sorted(n for batch in batches for n in batch.samples) == list(range(3, 3 + num))
    for batch in batches:
        assert batch.input_ids.numel() <= tokens or len(batch.samples) == 1
        for row, number in enumerate(batch.samples):
            wanted = sequence(samples[number - 3], "causal")
            real = batch.attention_mask[row].bool()
            assert batch.names[row] == samples[number - 3].id
            assert batch.input_ids[row][real].tolist() == wanted.input_ids.tolist()
            assert batch.targets[row][real].tolist() == wanted.targets.tolist()
            assert (batch.targets[row][~real] == IGNORED).all()
            assert int(batch.num_targets[row]) == num_targets(samples[number - 3], "causal")


def test_samples_of_like_length_share_a_batch():
    samples = [sample(range(n), range(n)) for n in (9, 3, 9, 3, 8, 3)]
    batches = list(make_batches(samples, names=["x"] * 6, batch_tokens=24, objective="causal"))
    assert [batch.samples for batch in batches] == [(0, 2, 4), (1, 3, 5)]
    assert sum(int((1 - batch.attention_mask).sum()) for batch in batches) == 1


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_masks_are_ones_then_zeros(objective):
    samples = mixed_samples(6, 50, seed=0)
    for batch in make_batches(samples, names=["x"] * 6, batch_tokens=40, objective=objective):
        assert (batch.attention_mask.diff(dim=1) <= 0).all()
        assert torch.equal(torch.tensor(batch.lengths), batch.attention_mask.sum(dim=1))
