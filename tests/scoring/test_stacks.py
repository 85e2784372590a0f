"""Heads side by side: which are put together, how they come apart, and that products in parts are the same products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from comparing import closeness
from jobs import job_for, pooled
from rounding import BLOCKS, SCORES
from zoo import TINY

from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect
from qkov_dist.scoring import engine, head_scorer, kernel, own_shares
from qkov_dist.scoring.fisher_sums import column
from qkov_dist.scoring.head_batches import head_batches
from qkov_dist.scoring.score import fisher_and_maps
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tile_gradients import Padded, joined
from qkov_dist.scoring.tiles import SHARED_O_BIAS, Selection, Tile

SITE = Site(0, "o_proj")


def head(number: int, *, rows: int = 8, block: str = "Q", bands: int = 1) -> list[Tile]:
    rect = Rect(rows * number, rows * (number + 1), 0, 4)
    return [Tile(SITE, block, number, band) for band in rect.split_rows(rows // bands)]


def numbers(tiles: list[Tile], most: int) -> list[list[int]]:
    return [[tiles[0].head for tiles in batch.heads] for batch in head_batches(tiles, most)]


def test_heads_of_one_shape_are_together_as_far_as_there_is_room():
    tiles = [tile for n in range(5) for tile in head(n)]
    assert numbers(tiles, 0) == [[0], [1], [2], [3], [4]]
    assert numbers(tiles, 64) == [[0, 1], [2, 3], [4]]
    assert numbers(tiles, 63) == [[0], [1], [2], [3], [4]]
    assert numbers(tiles, 10**9) == [[0, 1, 2, 3, 4]]
    of_many_samples = head_batches(tiles, 100, num_samples=50)  # 50 x 50 scores a head, beside 50 x 32 gradients
    assert [len(batch.heads) for batch in of_many_samples] == [2, 2, 1]


def test_heads_of_other_shapes_or_cuts_and_what_belongs_to_none_are_not():
    assert numbers([*head(0), *head(1, block="K"), *head(2, block="K")], 10**9) == [[0, 1, 2]]
    assert numbers([*head(0), *head(1, block=SHARED_O_BIAS)], 10**9) == [[0], [1]]
    assert numbers([*head(0), *head(1, rows=16)], 10**9) == [[0], [1]]
    assert numbers([*head(0, bands=2), *head(1, bands=2), *head(2)], 10**9) == [[0, 1], [2]]
    bias = Tile(SITE, "Q", 1, Rect(8, 16, 0, 4), bias=True)
    assert numbers([*head(0), bias], 10**9) == [[0], [1]]


def test_a_head_batch_comes_apart_into_heads_then_tiles():
    (batch,) = head_batches([*head(0, bands=2), *head(1, bands=2), *head(2, bands=2)], 10**9)
    assert [[tile.head for tile in band] for band in batch.bands] == [[0, 1, 2], [0, 1, 2]]
    first, rest = batch.smaller()
    assert (len(first.heads), len(rest.heads)) == (1, 2)
    (halves,) = first.smaller()
    assert [tile.rect.shape for tile in halves.heads[0]] == [(2, 4)] * 4
    assert halves.largest == 8


def test_what_adjoins_is_one_rectangle():
    rows, gap = [Rect(0, 2, 0, 4), Rect(2, 4, 0, 4)], Rect(6, 8, 0, 4)
    assert joined(rows) == ([Rect(0, 4, 0, 4)], False)
    assert joined([*rows, gap]) == ([Rect(0, 4, 0, 4), gap], False)
    assert joined([gap, *rows]) == ([gap, Rect(0, 4, 0, 4)], False)
    columns = [Rect(0, 4, 0, 2), Rect(0, 4, 2, 4)]
    assert joined(columns) == ([Rect(0, 4, 0, 4)], True)
    assert joined([*columns, Rect(0, 4, 6, 8)]) == ([Rect(0, 4, 0, 4), Rect(0, 4, 6, 8)], True)
    assert joined([gap]) == ([gap], False)


class Products:
    """Notes each rectangle that gradients of a group of samples are formed of, and the blocks that are together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.areas: list[int] = []
        self.blocks: list[set[str]] = []
        put, work = Padded.put_gradients, head_scorer.HeadScorer.__call__

        def formed(padded, rect, bias, out, *, turned=False):
            self.areas.append(rect.area)
            put(padded, rect, bias, out, turned=turned)

        def worked(scorer, batch, site, buffers):
            self.blocks.append({tile.block for tile in batch.first_tiles})
            return work(scorer, batch, site, buffers)

        monkeypatch.setattr(Padded, "put_gradients", formed)
        monkeypatch.setattr(head_scorer.HeadScorer, "__call__", worked)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_query_key_and_value_heads_are_formed_in_one_product(name, monkeypatch):
    """Of modules of their own, and of one that holds all: as many products as there are groups of samples."""
    entry = TINY[name]
    seen = Products(monkeypatch)
    job_for(entry, settings=ScoreSettings(head_batch_bytes=2**20)).run(entry.build(num_hidden_layers=1))
    assert sorted(map(sorted, seen.blocks)) == [["K", "Q", "V"], ["O"]]
    assert len({*seen.areas}) == 2
    assert seen.areas.count(max(seen.areas)) == seen.areas.count(min(seen.areas))


@pytest.mark.parametrize("heads", [None, (0, 1), (1, 3)])
def test_they_are_not_where_one_batch_cannot_hold_them_or_samples_are_gradients(heads, monkeypatch):
    entry, seen = TINY["llama"], Products(monkeypatch)
    model, selection = entry.build(num_hidden_layers=1), Selection(None, heads)
    small, kept = {"settings": ScoreSettings(head_batch_bytes=2**13)}, {"gradients_above": 6}
    expected = job_for(entry, selection=selection).run(model)[0]
    for how in ({}, small, kept):
        del seen.blocks[:]
        settings = ScoreSettings(head_batch_bytes=2**20)
        found = job_for(entry, selection=selection, **{"settings": settings, **how}).run(model)[0]
        assert ({"Q", "K", "V"} in seen.blocks) == (not how)
        for block, part in expected.items():
            assert closeness(found[block].scores, part.scores.double()) < SCORES


F64 = ScoreSettings(dtype=torch.float64, ridge_relative=0.5, epsilon=1e-7)


@pytest.mark.parametrize("changes", [{}, {"ridge_absolute": 1e-4}, {"ridge_relative": 0.0}], ids=str)
@pytest.mark.parametrize("score", list(KINDS))
def test_each_block_keeps_its_own_ridge_among_others(score, changes, monkeypatch):
    """Also of what is compiled: scores, sums of I, effects and own shares are those of a head by itself."""
    entry = TINY["llama"]
    model, settings = entry.build().double(), replace(F64, score=score, **changes)
    one_by_one = pooled(entry, settings=settings).run(model)
    for fused in (None, fisher_and_maps):
        monkeypatch.setattr(head_scorer, "Rule", lambda *rule, fused=fused: kernel.Rule(*rule[:5], fused))
        together = pooled(entry, settings=replace(settings, head_batch_bytes=2**20)).run(model)
        for layer, blocks in one_by_one.items():
            for block, part in blocks.items():
                found = together[layer][block]
                for name in ("scores", "fisher", "influences", "own_shares"):
                    mine, theirs = (np.asarray(getattr(of, name)) for of in (found, part))
                    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-11 * np.abs(theirs).max())


def test_each_block_keeps_its_own_stride_among_others(monkeypatch):
    """Blocks of which ranks hold unlike parts differ in it, though heads' parts are of one shape here."""
    monkeypatch.setattr(own_shares, "CHOSEN", 40)
    monkeypatch.setattr(engine, "stride_of", lambda layer, block: {"Q": 3, "K": 2, "V": 5, "O": 1}[block])
    entry = TINY["llama"]
    model = entry.build().double()
    one_by_one = pooled(entry, settings=F64).run(model)
    together = pooled(entry, settings=replace(F64, head_batch_bytes=2**20)).run(model)
    for layer, blocks in one_by_one.items():
        for block, part in blocks.items():
            np.testing.assert_allclose(together[layer][block].own_shares, part.own_shares, rtol=1e-9)


def test_scores_of_some_layers_stay_where_they_were_formed():
    entry = TINY["llama"]
    for batch_bytes in (0, 2**20):
        settings = ScoreSettings(head_batch_bytes=batch_bytes, kept_layers=frozenset({1}))
        found = job_for(entry, settings=settings, include_bias=True).run(entry.build())
        assert {part.kept for part in found[0].values()} == {None}
        assert all(torch.equal(part.kept, part.scores) for part in found[1].values())


@pytest.mark.parametrize(("heads", "size", "parts"), [(9, 36864, 32), (1, 36864, 64), (9, 513, 1), (600, 36864, 1)])
def test_products_are_cut_into_parts_that_fill_a_gpu(heads, size, parts):
    assert kernel.num_parts(heads, 128, 100, size) == parts


def test_products_in_parts_are_the_products(monkeypatch):
    entry, seen = TINY["llama"], []
    model, job = entry.build(), job_for(entry)
    expected = job.run(model)
    count = kernel.num_parts

    def counted(*sizes: int) -> int:
        seen.append(count(*sizes))
        return seen[-1]

    monkeypatch.setattr(kernel, "LEAST_PART", 8)
    monkeypatch.setattr(kernel, "num_parts", counted)
    got = job_for(entry, settings=ScoreSettings(head_batch_bytes=2**20)).run(model)
    assert max(seen) > 1
    for layer, blocks in expected.items():
        for block, part in blocks.items():
            assert closeness(got[layer][block].scores, part.scores.double()) < SCORES
            for one, other in zip(got[layer][block].fisher, part.fisher, strict=True):
                assert column(one, "sum") == pytest.approx(column(other, "sum"), rel=BLOCKS)
                assert np.isfinite(column(one, "sum"))
