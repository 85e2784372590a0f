"""What one rank has of one layer to score, in integers: elements, heads, features that have to come, the largest tile.

It is read off the rank's own ``scoring.tiles.LayerTiles`` and ``scoring.exchange.needs_of``, which a run
goes by. Layers of one kind of which a rank owns the same rectangles are looked at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from qkov_dist.capture.forms import gradients_above, shared_inputs
from qkov_dist.distributed.ownership import Owned
from qkov_dist.distributed.placements import HeldRects, Interval
from qkov_dist.distributed.sharding import parameter_name, parameters_of
from qkov_dist.distributed.topology import Topology
from qkov_dist.layout.heads import BLOCKS, AttentionLayer, Layout, Projection, Site
from qkov_dist.layout.rects import Rect
from qkov_dist.scoring.exchange import needs_of
from qkov_dist.scoring.extent import Scoring
from qkov_dist.scoring.tiles import (
    SHARED_O_BIAS,
    Selection,
    Tile,
    cut,
    in_order_of_work,
    layer_tiles,
    with_tiles,
)

UNCUT = 2**62  # elements of a tile that nothing exceeds
Needs = tuple[tuple[int, int, int], ...]  # by threshold, numbers for each token of a factor, and for each gradient
Columns = Sequence[Sequence[HeldRects]]  # of each parameter of a layer, what every rank owns


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
        least_cols: Of ``cols``, those at which an element is scored.
        least_rows: Of ``rows``, likewise.
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
    least_cols: int = 0
    least_rows: int = 0


@dataclass(frozen=True, eq=False)
class LayerWork:
    """One layer.

    Attributes:
        sites: Its projections that are captured.
        heads: By block, the heads of which the rank owns an element.
        every_head: By block, the heads that are scored by any rank.
        tile: Elements of the rank's largest tile, or of those that it works on together.
        as_one: The places of projections whose X several read that a GPU works on as one, where no sample of theirs is
            kept as its gradient.
    """

    sites: tuple[SiteWork, ...]
    heads: Mapping[str, tuple[int, ...]]
    every_head: Mapping[str, tuple[int, ...]]
    tile: int
    as_one: frozenset[int] = frozenset()

    def in_order(self) -> list[SiteWork]:
        """The projections of which the rank scores an element, in the order in which it does."""
        areas = {site: site.area + site.bias_area for site in self.sites}
        sites = {site.place: site for site, area in areas.items() if area}
        work = {place: (site.input, areas[site]) for place, site in sites.items()}
        return [sites[place] for place in in_order_of_work(work)]

    @cached_property
    def needs(self) -> Needs:
        """What comes to the rank."""
        return tuple((site.above, site.cols + site.rows, site.whole) for site in self.sites)

    @cached_property
    def least(self) -> Needs:
        """What it cannot do without: features at which it scores an element, and these elements of gradients."""
        return tuple((site.above, site.least_cols + site.least_rows, site.area + site.bias_area) for site in self.sites)

    @cached_property
    def last(self) -> Needs:
        """What came for the projection, or those worked on as one, still in work when the next layer comes."""
        if not (order := self.in_order()):
            return ()
        last = order[-1]
        together = [site for site in order if site.input == last.input] if last.input in self.as_one else [last]
        of_input = next(site.cols for site in self.sites if site.place == last.input)
        return tuple((site.above, site.rows + of_input * (site is last), site.whole) for site in together)


def layer_work(
    layout: Layout, layers: Sequence[int], topology: Topology, scoring: Scoring
) -> list[dict[int, LayerWork]]:
    """What every rank of a topology has of every layer, by rank and layer number."""
    kinds: dict[tuple[object, ...], _Kind] = {}
    found: list[dict[int, LayerWork]] = [{} for _ in range(topology.world.size)]
    for index in layers:
        layer = layout.layer(index)
        key = tuple((p.shape, p.has_bias, p.slices) for p in layer.projections)
        if key not in kinds:
            kinds[key] = _Kind(layer, layout, scoring)
        for rank, work in enumerate(kinds[key].of_ranks(_columns(layout, index, topology))):
            found[rank][index] = work
    return found


def _columns(layout: Layout, index: int, topology: Topology) -> Columns:
    """What every rank owns of each parameter of a layer."""
    parameters = parameters_of(layout, [index])
    if topology.ownership is None:
        return [((projection.whole(bias),),) for projection, bias in parameters]
    return [topology.ownership.owned[parameter_name(projection, bias)] for projection, bias in parameters]


class _Kind:
    """Layers of one kind: what a rank has of one follows from what it owns of each parameter."""

    def __init__(self, layer: AttentionLayer, layout: Layout, scoring: Scoring) -> None:
        self._layer, self._scoring = layer, scoring
        selection = Selection(None, scoring.selection.heads)
        self._all_ranks = layer_tiles(layer, selection, include_bias=scoring.include_bias)
        self._scored = self._all_ranks.scored()
        self._parameters = [(projection.module, bias) for projection, bias in parameters_of(layout, [layer.index])]
        self._sharing = {s: group[0][0] for group in shared_inputs(layer, self._all_ranks.sites) for s, _ in group}
        self._above = gradients_above([layer], scoring.factor_itemsize)
        self._by_rects: dict[tuple[HeldRects, ...], LayerWork] = {}
        self._by_columns: dict[tuple[int, ...], tuple[Columns, list[LayerWork]]] = {}

    def of_ranks(self, columns: Columns) -> list[LayerWork]:
        """By rank; layers may share what is owned of them."""
        key = tuple(map(id, columns))
        if key not in self._by_columns:
            self._by_columns[key] = columns, [self._of_rank(rects) for rects in zip(*columns, strict=True)]
        return self._by_columns[key][1]

    def _of_rank(self, rects: tuple[HeldRects, ...]) -> LayerWork:
        if rects not in self._by_rects:
            self._by_rects[rects] = self._made(dict(zip(self._parameters, rects, strict=True)))
        return self._by_rects[rects]

    def _made(self, rects: Mapping[tuple[str, bool], HeldRects]) -> LayerWork:
        def owned(projection: Projection, bias: bool) -> HeldRects:
            return rects[projection.module, bias]

        mine = with_tiles(self._layer, self._all_ranks, owned, UNCUT)
        heads: dict[str, set[int]] = {}
        for tile in mine.tiles:
            heads.setdefault(tile.block, set()).add(tile.head)
        largest, as_one = _largest_tile(mine.tiles, self._sharing, self._scoring)
        return LayerWork(
            self._sites(mine.tiles, owned),
            {block: tuple(sorted(found)) for block, found in heads.items()},
            mine.heads,
            largest,
            frozenset(n for n, p in enumerate(self._layer.projections) if Site(self._layer.index, p.module) in as_one),
        )

    def _sites(self, tiles: Sequence[Tile], owned: Owned) -> tuple[SiteWork, ...]:
        layer, areas = self._layer, Counter[tuple[Site, str]]()
        needs = {(need.kind, need.site): need for need in needs_of(layer, self._scored, owned, self._sharing)}
        scored: dict[tuple[str, Site], set[Interval]] = {}
        for tile in tiles:
            kind = "shared" if tile.block == SHARED_O_BIAS else "bias" if tile.bias else "weight"
            areas[tile.site, kind] += tile.rect.area
            scored.setdefault(("d", tile.site), set()).add((tile.rect.row, tile.rect.row_end))
            if not tile.bias:
                scored.setdefault(("x", self._sharing[tile.site]), set()).add((tile.rect.col, tile.rect.col_end))

        def width(kind: str, site: Site) -> int:
            need = needs.get((kind, site))
            return 0 if need is None else math.prod(need.shape)

        places = {Site(layer.index, projection.module): n for n, projection in enumerate(layer.projections)}
        return tuple(
            SiteWork(
                place=place,
                above=self._above[site],
                input=places[self._sharing[site]],
                area=areas[site, "weight"],
                bias_area=areas[site, "bias"] + areas[site, "shared"],
                shared_area=areas[site, "shared"],
                cols=width("x", site),
                rows=width("d", site),
                whole=width("g", site),
                least_cols=_covered(scored.get(("x", site), ())),
                least_rows=_covered(scored.get(("d", site), ())),
            )
            for site, place in places.items()
            if site in self._sharing
        )


def _covered(intervals: Iterable[Interval]) -> int:
    """How many integers lie in at least one of some intervals."""
    covered, end = 0, 0
    for low, high in sorted(intervals):
        covered += max(high - max(low, end), 0)
        end = max(end, high)
    return covered


def _largest_tile(tiles: Sequence[Tile], sharing: Mapping[Site, Site], scoring: Scoring) -> tuple[int, frozenset[Site]]:
    """Elements of the largest tile that heads are cut into; on a GPU of as many heads as it takes at once.

    Args:
        tiles: The rank's parts of heads, uncut.
        sharing: Whose X each projection reads.
        scoring: What is scored.

    Returns:
        The elements, and the projections whose X several read that are worked on as one.
    """
    by_input: dict[Site, dict[Site, list[Tile]]] = {}
    for tile in tiles:
        by_input.setdefault(sharing[tile.site], {}).setdefault(tile.site, []).append(tile)
    largest, as_one = 0, set()
    for shared, by_site in by_input.items():
        parts = [*by_site.values()]
        if len(parts) > 1 and _fit_one_batch(chain.from_iterable(parts), scoring):
            as_one.add(shared)
            parts = [[*chain.from_iterable(parts)]]
        for size, num in chain.from_iterable(_alike(part, scoring) for part in parts):
            largest = max(largest, size * min(num, _at_once(size, scoring)))
    return largest, frozenset(as_one)


def _fit_one_batch(tiles: Iterable[Tile], scoring: Scoring) -> bool:
    """Whether a GPU works on all weights at once: their heads are alike, and few."""
    alike = _alike([tile for tile in tiles if not tile.bias], scoring)
    return len(alike) == 1 and alike[0][1] <= _at_once(alike[0][0], scoring)


def _alike(tiles: Sequence[Tile], scoring: Scoring) -> list[tuple[int, int]]:
    """Of heads' parts that are cut alike: the elements of a tile, and how many parts there are."""
    shapes = Counter((tile.rect.shape, tile.bias, tile.block in BLOCKS) for tile in tiles)
    most = scoring.max_elements
    return [(max(piece.area for piece in cut(Rect.of_shape(*of), most)), num) for (of, _, _), num in shapes.items()]


def _at_once(size: int, scoring: Scoring) -> int:
    """How many tiles of a size are worked on together."""
    return max(scoring.max_elements // max(size, scoring.num_samples), 1) if scoring.on_gpu else 1
