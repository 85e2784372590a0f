"""Heads side by side: which are put together, how they come apart, and that products in parts are the same products."""

from __future__ import annotations

import numpy as np
import pytest
from comparing import closeness
from jobs import job_for
from rounding import BLOCKS, SCORES
from zoo import TINY

from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect
from qkov_dist.scoring import kernel
from qkov_dist.scoring.fisher_sums import column
from qkov_dist.scoring.head_batches import head_batches
from qkov_dist.scoring.settings import ScoreSettings
from qkov_dist.scoring.tiles import Tile

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


def test_heads_of_other_blocks_shapes_or_cuts_are_not():
    assert numbers([*head(0), *head(1, block="K"), *head(2, block="K")], 10**9) == [[0], [1, 2]]
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
