from __future__ import annotations

import pytest
import torch
from oracle import PAIRS
from rounding import reordered

from qkov_dist.scoring.fisher_sums import FISHER_COLUMNS, add, column, no_sums
from qkov_dist.scoring.kernel import Rule, add_tile
from qkov_dist.scoring.score import (
    added_fisher_sums,
    compiled,
    diagonal_fisher,
    fisher_and_maps,
    fisher_sums,
    maps,
    pair_scores,
    sample_gradients,
)
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.tile_gradients import Buffers

SPANS = [(0, 3), (3, 4), (4, 9)]


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 6, generator=generator).double(), torch.randn(9, 8, generator=generator).double()


def test_gradients_are_products_over_each_samples_own_tokens(factors):
    x, d = factors
    tile = sample_gradients(x[:, 1:4], d[:, 2:5], SPANS)
    for n, (start, stop) in enumerate(SPANS):
        whole = sum(torch.outer(d[t], x[t]) for t in range(start, stop))
        torch.testing.assert_close(tile[n].view(3, 3), whole[2:5, 1:4], rtol=1e-12, atol=1e-12)


def test_a_bias_is_a_weight_with_an_input_of_ones(factors):
    _, d = factors
    bias = sample_gradients(None, d[:, 2:5], SPANS)
    ones = sample_gradients(torch.ones(9, 1).double(), d[:, 2:5], SPANS)
    torch.testing.assert_close(bias, ones, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", list(KINDS))
def test_scores_follow_the_definition_and_tiles_add_up(factors, score):
    x, d = factors
    weights = torch.tensor([0.2, 0.5, 0.3]).double()
    regularisation = {"epsilon": 0.3, "ridge": 0.1}

    def scores(rows: slice) -> torch.Tensor:
        gradients = sample_gradients(x, d[:, rows], SPANS)
        fisher = diagonal_fisher(gradients, weights)
        return pair_scores(gradients, fisher, left=slice(0, 2), right=slice(1, 3), score=score, **regularisation)

    whole = sample_gradients(x, d, SPANS)
    regularised = sum(w * g.square() for w, g in zip(weights, whole, strict=True)).clamp_min(0.3) + 0.1
    expected = [[float(PAIRS[score](whole[i], whole[j], regularised)) for j in (1, 2)] for i in (0, 1)]
    torch.testing.assert_close(scores(slice(0, 8)), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores(slice(0, 3)) + scores(slice(3, 8)), scores(slice(0, 8)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("score", ["signed", "symmetric", "curvature"])
def test_symmetric_scores_are_transposes_of_each_other(factors, score):
    gradients = sample_gradients(*factors, SPANS)
    fisher = gradients.square().mean(dim=0)
    settings = {"score": score, "epsilon": 1e-10, "ridge": 1e-8}
    forward = pair_scores(gradients, fisher, left=slice(0, 1), right=slice(1, 3), **settings)
    backward = pair_scores(gradients, fisher, left=slice(1, 3), right=slice(0, 1), **settings)
    torch.testing.assert_close(forward, backward.t(), rtol=1e-14, atol=0)


def test_sums_of_fisher_are_additive():
    fisher = torch.tensor([1e-12, 3.0, 0.5, 2.0])
    tasks = torch.stack([fisher / 4, fisher * 3 / 4])
    cuts = ((0, 1), (1, 4), (0, 4))
    first, second, whole = (fisher_sums(tasks[:, None, low:high], [0.6]) for low, high in cuts)
    assert added_fisher_sums(first, second).tolist() == whole.tolist()
    parts = no_sums(2)
    for more in (first, second):
        add(parts, more.numpy(), [1])
    assert parts[1].tolist() == whole[0].tolist()
    assert parts[0].tolist() == no_sums(1)[0].tolist()
    of_halves = [fisher_sums(tasks[:, None, low:high], [0.6])[0].tolist() for low, high in ((0, 2), (2, 4))]
    assert fisher_sums(tasks.view(2, 2, 2), [0.6]).tolist() == of_halves
    found = {name: column(parts[1], name) for name in FISHER_COLUMNS}
    assert found["sum_of_a"] == pytest.approx(found["sum"] / 4)
    assert (found["count"], found["num_ridge_above"]) == (4, 2)
    assert found["min"] == pytest.approx(1e-12)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("score", list(KINDS))
def test_what_is_compiled_is_the_fisher_and_the_maps(factors, score):
    gradients = sample_gradients(*factors, SPANS).float()
    weights = torch.tensor([[0.25, 0.5, 0.0], [0.0, 0.0, 0.125]])
    floor = torch.tensor([[0.5], [0.125]]).expand(2, gradients.shape[1])
    by_task = diagonal_fisher(gradients, weights)
    expected = (by_task, *maps(gradients, (by_task.sum(0).clamp_min(0.5) + 0.125).reciprocal(), score))
    assert len(by_task.sum(0).clamp_min(0.5).unique()) > 1
    for form in (fisher_and_maps, compiled("cpu")):
        for got, wanted in zip(form(gradients, weights, floor, score), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=reordered(30), atol=0)  # three terms, some ten operations


@pytest.mark.parametrize("score", list(KINDS))
@pytest.mark.parametrize("floor", [0.0, 1e-60])
@pytest.mark.parametrize("fused", [None, fisher_and_maps])
def test_a_term_without_gradient_is_zero_also_where_nothing_keeps_r_above_zero(score, floor, fused):
    """Elements that no sample has a gradient at: 0 / 0, and in float32 also 0 / 1e-60, must add nothing."""
    rng = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 1, 12, generator=rng)
    silent = torch.arange(12) % 3 == 0
    gradients[..., silent] = 0.0
    weights = torch.full((2, 5), 0.1)

    def scored(part, ridge):
        rule = Rule(score, floor, (ridge,), slice(0, 2), slice(2, 5), fused)
        scores = torch.zeros(1, 2, 3)
        add_tile(scores, part.clone(), weights, rule, Buffers())
        return scores

    found = scored(gradients, 0.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found, scored(gradients[..., ~silent], 0.0), rtol=1e-5, atol=1e-6)
    assert not scored(torch.zeros(5, 1, 12), 0.0).any()  # a block that the loss does not depend on at all


def test_a_gradient_where_the_fisher_of_the_other_task_is_zero_is_infinite_not_zero():
    gradients = torch.ones(2, 1, 3)
    gradients[0] = 0.0  # the only sample of the Fisher
    scores = torch.zeros(1, 2, 2)
    rule = Rule("signed", 0.0, (0.0,), slice(0, 2), slice(0, 2))
    add_tile(scores, gradients, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), rule, Buffers())
    assert not scores[0, 1, 1].isfinite()
