"""What samples' own shares of the Fisher do to scores: the engine's sums against gradients by autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from expected import _fisher, _heads, _regularisation
from jobs import Pooled, job_for, pooled
from zoo import TINY

from qkov_dist.layout.rects import Rect
from qkov_dist.scoring import own_shares
from qkov_dist.scoring.own_share_records import KNOWN, SUMS, known, of_pair
from qkov_dist.scoring.own_shares import CHOSEN, RUN, chosen
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import ScoreSettings

MAPS = {"gradient": lambda g: g, "magnitude": np.abs, "square": np.square}
F64 = ScoreSettings(dtype=torch.float64)


def expected_sums(entry, model, job: Pooled) -> dict[int, dict[str, np.ndarray]]:
    """Rows and columns of M' and of M by task, and V of each sample, [heads, 7, 2, N], pair by pair."""
    kind, weights = KINDS[job.settings.score], job.roles().weights.sum(0)
    num, num_a = len(weights), len(job.a)
    found: dict[int, dict[str, np.ndarray]] = {}
    for layer, heads in _heads(entry, model, job):
        found[layer] = {}
        for block in heads[0]:
            fishers = oracle.regularised_fishers(heads, block, _fisher(job), **(_regularisation(job) | NO_RIDGE))
            regularised = oracle.regularised_fishers(heads, block, _fisher(job), **_regularisation(job))
            of_heads = []
            for h, (fisher, with_ridge) in enumerate(zip(fishers, regularised, strict=True)):
                g = np.stack([sample[block][h].numpy().ravel() for sample in heads])
                plain, ridge = fisher.numpy().ravel(), (with_ridge - fisher).numpy().ravel()
                left, right = MAPS[kind.left](g), MAPS[kind.right](g)
                rest = weights.sum() / (weights.sum() - weights)
                others = (plain - weights[:, None] * g**2) * rest[:, None]
                without = np.stack([left[i] / (others[i] + ridge) @ right.T for i in range(num)])
                given = (left / (plain + ridge)) @ right.T
                without = (without + without.T) / 2 if kind.is_symmetric else without
                lost = [((plain + ridge) / (of_others + ridge)) ** kind.power - 1 for of_others in others]
                lost = [left / (others + ridge) * of_k @ right.T for of_k in lost]
                lost = [(of_k + of_k.T) / 2 if kind.is_symmetric else of_k for of_k in lost]
                of_heads.append([*sums_of(without, num_a), *sums_of(given, num_a), *sums_without(lost, num_a)])
            found[layer][block] = np.array(of_heads)
    return found


NO_RIDGE = {"epsilon": 0.0, "absolute": 0.0, "relative": 0.0}


def sums_of(matrix: np.ndarray, num_a: int) -> list[np.ndarray]:
    matrix = matrix * (1 - np.eye(len(matrix)))
    is_a = np.arange(len(matrix)) < num_a
    return [np.stack([m[:, is_a].sum(1), m[:, ~is_a].sum(1)]) for m in (matrix, matrix.T)]


def sums_without(matrices: list[np.ndarray], num_a: int) -> np.ndarray:
    """Sums of matrix k over pairs without k: its own task with t, t with its own, t among itself, [3, 2, N]."""
    num = len(matrices)
    is_of = np.arange(num) < num_a
    found = np.zeros((3, 2, num))
    for k, matrix in enumerate(matrices):
        there = (np.arange(num) != k).astype(float)
        counted = matrix * (1 - np.eye(num)) * there * there[:, None]
        own = is_of == is_of[k]
        for task, of_task in enumerate((is_of, ~is_of)):
            found[:, task, k] = [
                counted[np.ix_(*of)].sum() for of in ((own, of_task), (of_task, own), (of_task, of_task))
            ]
    return found


@pytest.mark.parametrize("score", ["interference", "symmetric", "curvature"])
@pytest.mark.parametrize(
    "changes", [{"estimator": "mean"}, {"estimator": "ema", "fisher_batch": 3}, {"estimator": "mean", "scope": "b"}]
)
def test_sums_are_those_of_every_pair_with_the_row_taken_out_of_its_fisher(score, changes):
    entry = TINY["llama"]
    model = entry.build().double()
    job = pooled(entry, settings=replace(F64, score=score), tile_bytes=2**14, **changes)
    found = job.run(model)
    for layer, blocks in expected_sums(entry, model, job).items():
        for block, expected in blocks.items():
            got = found[layer][block].own_shares.reshape(expected.shape)
            signed = np.abs(expected[:, 4:]).max()
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10 * signed, err_msg=f"{layer} {block}")
            without, given = expected[:, :2], expected[:, 2:4]
            assert not np.allclose(without, given, rtol=1e-2)  # a share left in would be seen
            said = known(found[layer][block].own_shares, len(job.a))
            np.testing.assert_allclose(said[:, :4].reshape(without.shape), without / given, rtol=1e-9)


def test_they_are_formed_where_they_are_asked_for_and_nowhere_else():
    entry = TINY["llama"]
    assert {of.own_shares.shape[1] for of in job_for(entry).run(entry.build())[0].values()} == {0}


@pytest.mark.parametrize("tile_bytes", [2**12, 2**20])
@pytest.mark.parametrize("head_batch_bytes", [0, 2**20])
def test_the_elements_looked_at_are_the_same_however_a_head_is_cut(monkeypatch, tile_bytes, head_batch_bytes):
    """Some of the elements, in float64: by one head and by several at a time, in small tiles and in large ones."""
    monkeypatch.setattr(own_shares, "CHOSEN", 48)
    entry = TINY["llama"]
    model = entry.build().double()
    settings = replace(F64, head_batch_bytes=head_batch_bytes)
    whole = pooled(entry, settings=F64).run(model)
    cut = pooled(entry, settings=settings, tile_bytes=tile_bytes).run(model)
    every = expected_sums(entry, model, pooled(entry, settings=F64))
    for layer, blocks in whole.items():
        for block, found in blocks.items():
            np.testing.assert_allclose(cut[layer][block].own_shares, found.own_shares, rtol=1e-9)
            of_all = every[layer][block].reshape(found.own_shares.shape)
            assert (found.own_shares < 0.9 * of_all).any()  # these are some of the elements alone


def test_about_as_many_elements_of_a_head_are_looked_at_as_are_wanted_and_each_once():
    rows, cols = 64, 4096
    stride = -(-rows * cols // CHOSEN)
    whole = chosen([Rect(128, 128 + rows, 0, cols)], [stride], "cpu")
    assert len(whole.places) == CHOSEN
    assert (whole.places.view(-1, RUN).diff(dim=1) == 1).all()
    parts = [Rect(128, 150, 0, 1000), Rect(128, 150, 1000, cols), Rect(150, 128 + rows, 0, cols)]
    found = []
    for part in parts:
        places = chosen([part], [stride], "cpu").places
        row, col = places // part.shape[1] + part.row, places % part.shape[1] + part.col
        found += ((row - 128) * cols + col).tolist()
    assert sorted(found) == whole.places.tolist()


def test_two_of_many_tasks_have_their_part_of_the_record():
    sizes = (3, 2, 4)
    records = np.random.default_rng(0).random((5, SUMS * 3 * 9))
    by_task = records.reshape(5, SUMS, 3, 9)
    samples = [0, 1, 2, 5, 6, 7, 8]
    expected = by_task[:, :, [0, 2]][..., samples]
    np.testing.assert_array_equal(of_pair(records, sizes, 0, 2).reshape(5, SUMS, 2, 7), expected)


def test_of_nothing_there_is_no_ratio_but_one_and_absent_heads_stay_absent():
    records = np.array([[0.0, 2.0] * 28, [np.nan] * 56])
    records[0, 4 * 8 :] = 0.0
    found = known(records, 2)
    assert found.shape == (2, len(KNOWN), 4)
    assert found[0].tolist() == [[1.0] * 4] * 4 + [[0.0] * 4]
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize("score", ["interference", "symmetric"])
def test_overlap_moves_as_it_does_under_a_fisher_without_a_sample(score):
    """Against overlap of M' without the sample's own pairs, pair by pair, under either Fisher."""
    rng, num_a, num, power = np.random.default_rng(3), 5, 9, KINDS[score].power
    g = rng.normal(size=(num, 40)) * np.exp(0.6 * rng.normal(size=(num, 1)))
    left, right = (MAPS[of](g) for of in (KINDS[score].left, KINDS[score].right))
    squares, is_a = g**2, np.arange(num) < num_a
    fisher = squares.mean(0)
    rows = (num * fisher - squares) / (num - 1)

    def overlap(k: int, change: np.ndarray) -> float:
        matrix = left / (rows * change) ** power @ right.T
        matrix = (matrix + matrix.T) / 2 if KINDS[score].is_symmetric else matrix
        there = (np.arange(num) != k).astype(float)
        counted = matrix * (1 - np.eye(num)) * there * there[:, None]
        ab, ba, aa, bb = (
            counted[np.ix_(*of)].sum() for of in ((is_a, ~is_a), (~is_a, is_a), (is_a, is_a), (~is_a, ~is_a))
        )
        return 0.5 * np.log(ab * ba / (aa * bb))

    weights = torch.full((2, num), 1 / num, dtype=torch.float64)
    weights[0, num_a:] = weights[1, :num_a] = 0
    sums = own_shares.OwnShares(own_shares.Shares.of(weights, (num_a, num - num_a)), 1, score, 0.0, [0.0])
    elements = own_shares.Chosen(torch.arange(40), None)
    sums.add(sums.kept(torch.from_numpy(g), elements), torch.from_numpy(fisher))
    found = known(sums.records().numpy(), num_a)[0, KNOWN.index("overlap")]
    expected = [overlap(k, rows[k] / fisher) - overlap(k, np.ones(40)) for k in range(num)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.abs(expected).min() > 1e-5


def test_a_sample_beside_whose_pairs_all_others_are_nothing_moves_nothing():
    """What is left of sums without it is rounding."""
    g = torch.rand(6, 30) + 0.5
    g[0] *= 1e6
    sums = own_shares.OwnShares(
        own_shares.Shares.of(torch.eye(2).repeat_interleave(3, 1) / 6, (3, 3)), 1, "interference", 0.0, [0.0]
    )
    sums.add(sums.kept(g, own_shares.Chosen(torch.arange(30), None)), g.square().mean(0))
    found = known(sums.records().numpy(), 3)[0, KNOWN.index("overlap")]
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 1
