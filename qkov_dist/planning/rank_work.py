"""What one rank has of one layer to score, in integers: elements, heads, features that have to come, the largest tile.

It is read off the rank's own ``scoring.tiles.LayerTiles`` and ``scoring.exchange.needs_of``, which a run
goes by. Layers of one kind of which a rank owns the same rectangles are looked at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qkov_dist.capture.forms import gradients_above, shared_inputs
from qkov_dist.distributed.ownership import Owned
from qkov_dist.layout.heads import AttentionLayer, Layout, Site
from qkov_dist.layout.rects import Rect
from qkov_dist.scoring.exchange import needs_of
from qkov_dist.scoring.extent import Scoring
from qkov_dist.scoring.tiles import SHARED_O_BIAS, LayerTiles, Selection, Tile, cut, in_order_of_work

UNCUT = 2**62  # bytes of a tile that nothing exceeds


@dataclass(frozen=True)
class SiteWork:
    """One projection.

    Attributes:
        place: Its place among the layer's projections.
        above: Tokens above which a sample is kept as its gradient.
        input: Place of the projection whose X it reads.
        area: Elements of selected heads of its weight.
        bias_area: Elements of selected heads of its bias, and those that no head owns.
        shared_area: Those that no head owns.
        cols: Features of X that have to come with this site; 0 where another site's X is read.
        rows: Features of D.
        whole: Elements of a gradient that is kept as such.
    """

    place: int
    above: int
    input: int
    area: int = 0
    bias_area: int = 0
    shared_area: int = 0
    cols: int = 0
    rows: int = 0
    whole: int = 0


@dataclass(frozen=True)
class LayerWork:
    """One layer.

    Attributes:
        sites: Its projections that are captured.
        heads: By block, the heads of which the rank owns an element.
        every_head: By block, the heads that are scored by any rank.
        tile: Elements of the rank's largest tile, or of those that it works on together.
    """

    sites: tuple[SiteWork, ...]
    heads: Mapping[str, tuple[int, ...]]
    every_head: Mapping[str, tuple[int, ...]]
    tile: int

    def in_order(self) -> list[SiteWork]:
        """The projections of which the rank scores an element, in the order in which it does."""
        areas = {site: site.area + site.bias_area for site in self.sites}
        sites = {site.place: site for site, area in areas.items() if area}
        work = {place: (site.input, areas[site]) for place, site in sites.items()}
        return [sites[place] for place in in_order_of_work(work)]


def layer_work(
    layout: Layout, layers: Sequence[int], owned_by_rank: Sequence[Owned], scoring: Scoring
) -> list[dict[int, LayerWork]]:
    """What every rank has of every layer, by rank and layer number."""
    known: dict[tuple[object, ...], LayerWork] = {}
    kinds: dict[tuple[object, ...], int] = {}
    found: list[dict[int, LayerWork]] = [{} for _ in owned_by_rank]
    for index in layers:
        layer = layout.layer(index)
        kind = kinds.setdefault(tuple((p.shape, p.has_bias, p.slices) for p in layer.projections), len(kinds))
        for rank, owned in enumerate(owned_by_rank):
            rects = tuple((owned(p, False), owned(p, True) if p.has_bias else ()) for p in layer.projections)
            if (kind, rects) not in known:
                known[kind, rects] = _layer_work(layer, owned, scoring)
            found[rank][index] = known[kind, rects]
    return found


def _layer_work(layer: AttentionLayer, owned: Owned, scoring: Scoring) -> LayerWork:
    only = Layout("", "", 1, (layer,), ())
    every_layer = replace(scoring, selection=Selection(None, scoring.selection.heads))
    (layer_tiles,) = every_layer.tile_plan(only, owned, UNCUT).layers
    heads: dict[str, set[int]] = {}
    for tile in layer_tiles.tiles:
        heads.setdefault(tile.block, set()).add(tile.head)
    return LayerWork(
        _site_work(layer, layer_tiles, owned, scoring),
        {block: tuple(sorted(found)) for block, found in heads.items()},
        layer_tiles.heads,
        _largest_tile(layer_tiles, scoring),
    )


def _site_work(layer: AttentionLayer, layer_tiles: LayerTiles, owned: Owned, scoring: Scoring) -> tuple[SiteWork, ...]:
    sharing = {site: group[0][0] for group in shared_inputs(layer, layer_tiles.sites) for site, _ in group}
    places = {Site(layer.index, projection.module): n for n, projection in enumerate(layer.projections)}
    above = gradients_above([layer], scoring.factor_itemsize)
    needs = {(need.kind, need.site): need for need in needs_of(layer, layer_tiles.sites, owned, sharing)}

    def count(tiles: Sequence[Tile], site: Site, bias: bool) -> int:
        return sum(tile.rect.area for tile in tiles if tile.site == site and tile.bias == bias)

    def width(kind: str, site: Site) -> int:
        need = needs.get((kind, site))
        return 0 if need is None else math.prod(need.shape)

    return tuple(
        SiteWork(
            place=place,
            above=above[site],
            input=places[sharing[site]],
            area=count(layer_tiles.tiles, site, False),
            bias_area=count(layer_tiles.tiles, site, True),
            shared_area=count([tile for tile in layer_tiles.tiles if tile.block == SHARED_O_BIAS], site, True),
            cols=width("x", site),
            rows=width("d", site),
            whole=width("g", site),
        )
        for site, place in places.items()
        if site in sharing
    )


def _largest_tile(layer_tiles: LayerTiles, scoring: Scoring) -> int:
    """Elements of the largest tile that heads' rectangles are cut into; on a GPU of as many heads as it takes at once.

    Args:
        layer_tiles: Heads' rectangles, uncut.
        scoring: What is scored.
    """
    most = scoring.max_elements
    alike = Counter((tile.site, tile.block, tile.rect.shape, tile.bias) for tile in layer_tiles.tiles)
    sizes = [
        (max(tile.area for tile in cut(Rect.of_shape(*shape), most)), num) for (_, _, shape, _), num in alike.items()
    ]
    if not scoring.on_gpu:
        return max((size for size, _ in sizes), default=0)
    least = scoring.num_samples
    return max((size * min(num, max(most // max(size, least), 1)) for size, num in sizes), default=0)
