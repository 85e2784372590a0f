"""Plans on integers: who scores what, for simulated ranks, without weights or processes."""

from __future__ import annotations

import pytest
from owners import flat_owner
from zoo import TINY

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import AttentionLayer, HeadSlice, Layout, Projection
from qkov_dist.layout.rects import Rect, check_exact_cover
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.architecture import meta_model
from qkov_dist.scoring.tiles import SHARED_O_BIAS, Selection, make_tile_plan


def layout_of(name: str, **overrides) -> Layout:
    config = TINY[name].config()
    for key, value in overrides.items():
        setattr(config, key, value)
    return resolve(meta_model(config))


def tile_plan_of(layout: Layout, selection: Selection | None = None, **options):
    return make_tile_plan(layout, selection or Selection(), **{"include_bias": False, "num_samples": 4, **options})


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_tiles_of_all_ranks_cover_every_head_exactly_once(name, world_size):
    layout = layout_of(name)
    tile_plans = [
        tile_plan_of(layout, include_bias=True, owned=flat_owner(rank, world_size), tile_bytes=700)
        for rank in range(world_size)
    ]
    for place, layer in enumerate(layout.layers):
        tiles = [tile for tile_plan in tile_plans for tile in tile_plan.layers[place].tiles]
        for projection in layer.projections:
            for piece in projection.slices:
                mine = [
                    tile.rect
                    for tile in tiles
                    if (tile.site.module, tile.block, tile.head, tile.bias)
                    == (projection.module, piece.block, piece.head, False)
                    and tile.rect.intersect(piece.rect)
                ]
                check_exact_cover(f"{projection.module} {piece.block}{piece.head}", piece.rect, mine)


def test_a_rank_counted_twice_would_be_seen():
    layout = layout_of("llama")
    tile_plan = tile_plan_of(layout, owned=flat_owner(0, 2))
    tiles = [tile.rect for tile in tile_plan.layers[0].tiles if tile.block == "Q" and tile.head == 0]
    piece = next(s.rect for p in layout.layers[0].projections for s in p.slices if (s.block, s.head) == ("Q", 0))
    with pytest.raises(QkovError, match="overlap"):
        check_exact_cover("Q0", piece, tiles * 2)


def test_block_sizes_are_those_of_whole_blocks_whatever_is_selected_or_owned():
    layout = layout_of("llama")
    whole, part = tile_plan_of(layout), tile_plan_of(layout, Selection(heads=(0,)), owned=flat_owner(1, 3))
    assert part.layers[0].block_sizes == whole.layers[0].block_sizes == {"Q": 2048, "K": 1024, "V": 1024, "O": 2048}
    for tile_plan in (whole, part):  # of a rank's share too: a relative ridge is relative to whole blocks
        assert sum(tile.rect.area for tile in tile_plan.layers[0].slices) == 6144


def test_tiles_fit_their_budget_and_a_row_is_the_least():
    layout = layout_of("llama")
    for tile_bytes, rows in [(4 * 4 * 32 * 3, 3), (1, 1)]:
        tile_plan = tile_plan_of(layout, tile_bytes=tile_bytes)
        assert max(tile.rect.shape[0] for tile in tile_plan.layers[0].tiles if tile.block == "Q") == rows


def test_kv_heads_follow_from_query_heads():
    tile_plan = tile_plan_of(layout_of("llama"), Selection(layers=(1, 0, 1), heads=(3, 2, 3)))
    assert [layer.layer for layer in tile_plan.layers] == [0, 1]
    assert tile_plan.layers[0].query_heads == (2, 3)
    assert tile_plan.layers[0].heads == {"Q": (2, 3), "K": (1,), "V": (1,), "O": (2, 3)}


def test_projections_without_a_selected_head_are_not_captured():
    layout = layout_of("gemma4_kv_shared")
    blocks = {layer.layer: set(layer.heads) for layer in tile_plan_of(layout).layers}
    assert blocks[0] == {"Q", "K", "V", "O"}
    assert blocks[3] == {"Q", "O"}


def test_the_output_bias_belongs_to_the_layer():
    tile_plan = tile_plan_of(layout_of("gpt2"), include_bias=True)
    shared = [tile for tile in tile_plan.layers[0].tiles if tile.block == SHARED_O_BIAS]
    assert [(tile.head, tile.rect, tile.bias) for tile in shared] == [(0, Rect(0, 32, 0, 1), True)]
    assert tile_plan.layers[0].block_sizes["Q"] == 32 * 32 + 32


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(layers=(2,)), r"metric.layers: expected .*0 to 1, got 2"),
        (Selection(heads=(0, 4)), r"metric.heads: expected query heads 0 to 3 \(layer 0\), got 4"),
        (Selection(heads=(-1,)), "metric.heads"),
    ],
)
def test_selections_out_of_range_are_refused(selection, message):
    with pytest.raises(QkovError, match=message):
        tile_plan_of(layout_of("llama"), selection)


def test_a_layer_without_attention_is_named_with_its_kind():
    with pytest.raises(QkovError, match=r"got 0 \(JambaMambaMixer"):
        tile_plan_of(layout_of("jamba"), Selection(layers=(0,)))


def test_heads_that_share_an_element_are_refused():
    slices = (HeadSlice("Q", 0, Rect(0, 3, 0, 4)), HeadSlice("Q", 1, Rect(2, 4, 0, 4)))
    projection = Projection("q", (4, 4), False, False, slices, "custom")
    layer = AttentionLayer(0, "attn", 2, 2, 2, 2, (projection,), ())
    with pytest.raises(QkovError, match=r"q.weight: expected head slices that share no element"):
        tile_plan_of(Layout("custom", "custom", 1, (layer,), ()))
