"""Intervals without what samples do through the Fisher, from what rows and columns of scores add up to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qkov_dist.scoring.own_share_records import KNOWN, known
from qkov_dist.scoring.own_shares import Chosen, OwnShares, Shares
from qkov_dist.stats.head_tests import head_tests
from qkov_dist.stats.statistics import QKOVStatistics
from qkov_dist.stats.without_own_shares import has_copies, without_own_shares

NUM_A, NUM, HEADS, WEIGHTS = 5, 9, 3, 40
OTHERS = ~torch.eye(NUM, dtype=torch.bool)


def matrices(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """M and M' [heads, N, N] of loud and of quiet samples, pair by pair; and what is known of their sums."""
    rng = np.random.default_rng(seed)
    g = np.exp(0.6 * rng.normal(size=(HEADS, NUM, 1))) * rng.normal(size=(HEADS, NUM, WEIGHTS))
    fisher = (g**2).mean(1, keepdims=True)
    others = (fisher - g**2 / NUM) * NUM / (NUM - 1)
    given, without = (torch.from_numpy((g**2 / of) @ np.abs(g).swapaxes(1, 2)) for of in (fisher, others))
    tasks = torch.tensor([[1.0] * NUM_A + [0.0] * (NUM - NUM_A), [0.0] * NUM_A + [1.0] * (NUM - NUM_A)]).double()
    sums = OwnShares(Shares.of(tasks / NUM, (NUM_A, NUM - NUM_A)), HEADS, "interference", 0.0, [0.0])
    in_a_row = torch.from_numpy(g).transpose(0, 1).reshape(NUM, -1)
    sums.add(sums.kept(in_a_row, Chosen(torch.arange(HEADS * WEIGHTS), None)), torch.from_numpy(fisher).flatten())
    return given, without, torch.from_numpy(known(sums.records().numpy(), NUM_A))


def of_parts(scores: Tensor) -> list[Tensor]:
    """AA, AB, BA and BB without any sample's pair with itself."""
    counted = scores.masked_fill(~OTHERS, 0.0)
    tasks = slice(0, NUM_A), slice(NUM_A, NUM)
    return [counted[:, rows, columns] for rows in tasks for columns in tasks]


def test_rows_columns_and_means_are_those_of_the_matrix_that_is_looked_for():
    given, without, of_samples = matrices()
    for found, wanted, before in zip(
        of_parts(without_own_shares(given, of_samples, OTHERS, NUM_A)), of_parts(without), of_parts(given), strict=True
    ):
        torch.testing.assert_close(found.sum(2), wanted.sum(2), rtol=1e-10, atol=0)
        torch.testing.assert_close(found.sum(1), wanted.sum(1), rtol=1e-3, atol=0)
        off, off_before = ((of - wanted).abs().sum() for of in (found, before))
        assert off < 0.5 * off_before  # pairs, too, are nearer to it than they were


def test_a_sample_without_gradient_and_an_absent_head_stay_what_they_are():
    given, _, of_samples = matrices()
    given[0], of_samples[0] = torch.nan, torch.nan
    given[1, 2], given[1, :, 2] = 0.0, 0.0
    found = without_own_shares(given, of_samples, OTHERS, NUM_A)
    assert found[0][OTHERS].isnan().all()
    assert found[1, 2].eq(0).all()
    assert found[1:].isfinite().all()


def test_a_heads_interval_is_the_same_beside_any_other_and_moves_with_what_is_known():
    given, _, of_samples = matrices()
    design = QKOVStatistics(n_permutations=30).design(NUM_A, NUM - NUM_A)
    whole, _ = head_tests({"Q": given}, design, {"Q": of_samples})
    for head in range(HEADS):
        alone, _ = head_tests({"Q": given[[head]]}, design, {"Q": of_samples[[head]]})
        for key, values in whole["Q"]["overlap"].arrays.items():
            assert alone["Q"]["overlap"].arrays[key] == values[head], key
    nothing, unmoved = torch.ones_like(of_samples), of_samples.clone()
    nothing[:, KNOWN.index("overlap")] = unmoved[:, KNOWN.index("overlap")] = 0.0
    before, _ = head_tests({"Q": given}, design)
    alike = given + given.mT  # samples are as loud in one role as in the other: nothing known is nothing changed
    of_alike = [head_tests({"Q": alike}, design, of)[0]["Q"]["overlap"].arrays for of in (None, {"Q": nothing})]
    apart, _ = head_tests({"Q": given}, design, {"Q": unmoved})
    for key in ("ci_low", "ci_high"):
        of_none, of_shares, freed = (of["Q"]["overlap"].arrays[key] for of in (before, apart, whole))
        np.testing.assert_allclose(of_alike[1][key], of_alike[0][key], rtol=1e-10)
        assert (np.abs(of_shares - of_none) > 1e-3).all()
        assert (np.abs(freed - of_shares) > 1e-4).all()


@pytest.mark.parametrize(("of_sample", "has"), [(None, False), (3, True)])
def test_copies_are_pairs_that_are_left_out(of_sample, has):
    pairs = OTHERS.clone()
    if of_sample is not None:
        pairs[0, of_sample] = pairs[of_sample, 0] = False
    assert has_copies(pairs) == has
