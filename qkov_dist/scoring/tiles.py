"""Who computes which part of which head: head slices ∩ owned rectangles, cut into tiles, before anything runs.

A plan is integers only. It is made from a layout and the rectangles a rank owns, needs no weights, and can be printed
and costed for a simulated number of ranks. Hot code is handed its tiles and decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from qkov_dist.distributed.ownership import Owned
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS, AttentionLayer, Layout, Projection, Site
from qkov_dist.layout.rects import Rect, first_overlap, merged

S = TypeVar("S", Site, int)
SHARED_O_BIAS = "O_bias"
TILE_BYTES = 12 * 2**20  # of gradients; every worker of a CPU has a tile, which the shared cache should hold
LONG_SIDE, LEAST_SIDE = 192, 64  # rows or columns from which products are quick, and below which they mostly read
GPU_TILE_BYTES = 256 * 2**20  # of gradients; a GPU has one, of one head or several: enough to be worth its launches


@dataclass(frozen=True)
class Tile:
    """A rectangle of one projection's weight (or of its bias, a column vector) that belongs to one head.

    ``block`` is Q, K, V, O, or ``O_bias`` for the output bias, which all heads share (head 0 stands for the layer).
    """

    site: Site
    block: str
    head: int
    rect: Rect
    bias: bool = False


@dataclass(frozen=True)
class LayerTiles:
    """The tiles of one layer.

    Attributes:
        layer: Layer number in the model.
        sites: The projections whose factors are needed.
        query_heads: The query heads selected.
        heads: The native heads scored in each block, whether or not this rank owns a part of them.
        tiles: What this rank scores, site by site.
        slices: Every head's slices at these projections, selected or not, owned or not: lambda is relative to the mean
            of I over them.
        block_sizes: Elements of each whole block over all ranks.
    """

    layer: int
    sites: tuple[Site, ...]
    query_heads: tuple[int, ...]
    heads: dict[str, tuple[int, ...]]
    tiles: tuple[Tile, ...]
    slices: tuple[Tile, ...]
    block_sizes: dict[str, int]

    def scored(self) -> dict[tuple[Site, bool], tuple[Rect, ...]]:
        """Where the heads to score lie, by projection and whether in its bias, as few rectangles."""
        found: dict[tuple[Site, bool], list[Rect]] = {}
        for tile in self.slices:
            if tile.head in self.heads.get(tile.block, ()):
                found.setdefault((tile.site, tile.bias), []).append(tile.rect)
        return {place: merged(rects) for place, rects in found.items()}


@dataclass(frozen=True)
class TilePlan:
    """All layers of a run."""

    layers: tuple[LayerTiles, ...]

    def only(self, layers: Sequence[int]) -> TilePlan:
        """The plan of some of the layers."""
        return TilePlan(tuple(layer for layer in self.layers if layer.layer in layers))

    @property
    def num_elements(self) -> int:
        """Elements of one sample's gradient that are formed."""
        return sum(tile.rect.area for layer in self.layers for tile in layer.tiles)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every projection to capture."""
        return tuple(site for layer in self.layers for site in layer.sites)


@dataclass(frozen=True)
class Selection:
    """Which layers and query heads to score; None means all.

    A kv head is scored when a selected query head uses it.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def layers_of(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The selected attention layers, in order.

        Raises:
            QkovError: for a layer the model does not have, or one without heads to score.
        """
        by_index = {layer.index: layer for layer in layout.layers}
        if self.layers is None:
            return tuple(by_index.values())
        for index in self.layers:
            if index not in by_index:
                raise _no_such_layer(index, layout)
        return tuple(by_index[index] for index in sorted(set(self.layers)))

    def query_heads(self, layer: AttentionLayer) -> tuple[int, ...]:
        """The selected query heads of a layer."""
        if self.heads is None:
            return tuple(range(layer.num_heads))
        if wrong := [head for head in self.heads if not 0 <= head < layer.num_heads]:
            raise QkovError(
                "metric.heads",
                expected=f"query heads 0 to {layer.num_heads - 1} (layer {layer.index})",
                got=str(wrong[0]),
                remedy="Choose heads that every selected layer has; kv heads follow from the query heads.",
            )
        return tuple(sorted(set(self.heads)))


def in_order_of_work(projections: Mapping[S, tuple[S, int]]) -> list[S]:
    """The order in which a layer's projections are scored: those of one X together, and most work last.

    While the last of a layer is worked on, the next layer's factors come.

    Args:
        projections: Projection -> whose X it reads, and the elements to be scored.
    """
    together = Counter[S]()
    for shared, work in projections.values():
        together[shared] += work

    def key(projection: S) -> tuple[int, S, int, S]:
        """Less for what comes earlier."""
        shared, work = projections[projection]
        return together[shared], shared, work, projection

    return sorted(projections, key=key)


def native_heads(layer: AttentionLayer, block: str, query_heads: Sequence[int]) -> tuple[int, ...]:
    """The native heads of a block that the given query heads use: themselves, or their kv heads h // G."""
    group = layer.group if block in ("K", "V") else 1
    wanted = {head // group for head in query_heads}
    return tuple(head for head in layer.heads(block) if head in wanted)


def tile_bytes(device_type: str) -> int:
    """Bytes of gradients of a tile, where heads are scored on such a device."""
    return TILE_BYTES if device_type == "cpu" else GPU_TILE_BYTES


def cut(rect: Rect, max_elements: int) -> tuple[Rect, ...]:
    """Cut a rectangle of a head into tiles of at most ``max_elements`` (or a row of few).

    A tile is as small as a quarter of that where its products are quick all the same: what is done with gradients
    that were just formed finds them in a nearer cache.
    """
    quick = LONG_SIDE * min(rect.shape)
    return rect.split(min(max(quick, max_elements // 4), max_elements), LEAST_SIDE)


def make_tile_plan(
    layout: Layout,
    selection: Selection,
    *,
    include_bias: bool,
    num_samples: int,
    itemsize: int = 4,
    owned: Owned | None = None,
    tile_bytes: int = TILE_BYTES,
) -> TilePlan:
    """Cut the selected heads into tiles.

    Args:
        layout: Where each head lives.
        selection: Layers and query heads to score.
        include_bias: Whether biases of Q, K, V count to their heads (and O's is reported per layer).
        num_samples: Samples whose gradients a tile holds at once.
        itemsize: Bytes of one gradient element.
        owned: The rectangles of a projection's weight (False) or bias (True) that this rank owns; all by default.
        tile_bytes: Size of a tile's gradients.
    """
    max_elements = max(tile_bytes // (num_samples * itemsize), 1)
    return TilePlan(
        tuple(
            with_tiles(layer, layer_tiles(layer, selection, include_bias=include_bias), owned or _whole, max_elements)
            for layer in selection.layers_of(layout)
        )
    )


def layer_tiles(layer: AttentionLayer, selection: Selection, *, include_bias: bool) -> LayerTiles:
    """What is the same for all ranks of one layer's tiles: all but the tiles themselves.

    Raises:
        QkovError: for heads that share an element, or that the layer does not have.
    """
    slices = [tile for projection in layer.projections for tile in _head_tiles(layer, projection, include_bias)]
    _check_disjoint(slices)
    query_heads = selection.query_heads(layer)
    heads = {block: native_heads(layer, block, query_heads) for block in BLOCKS}
    heads[SHARED_O_BIAS] = (0,) if any(tile.block == SHARED_O_BIAS for tile in slices) else ()
    sizes: dict[str, int] = {}
    for tile in slices:
        sizes[tile.block] = sizes.get(tile.block, 0) + tile.rect.area
    return LayerTiles(
        layer=layer.index,
        sites=tuple(sorted({tile.site for tile in slices if tile.head in heads[tile.block]})),
        query_heads=query_heads,
        heads={block: chosen for block, chosen in heads.items() if chosen},
        tiles=(),
        slices=tuple(slices),
        block_sizes=sizes,
    )


def with_tiles(layer: AttentionLayer, all_ranks: LayerTiles, owned: Owned, max_elements: int) -> LayerTiles:
    """The same with the tiles of the rank that owns these rectangles, of at most ``max_elements``."""
    projections = {projection.module: projection for projection in layer.projections}
    tiles = [
        Tile(tile.site, tile.block, tile.head, band, tile.bias)
        for tile in all_ranks.slices
        if tile.head in all_ranks.heads.get(tile.block, ())
        for piece in owned(projections[tile.site.module], tile.bias)
        if (common := tile.rect.intersect(piece))
        for band in cut(common, max_elements)
    ]
    return replace(all_ranks, tiles=tuple(tiles))


def _head_tiles(layer: AttentionLayer, projection: Projection, include_bias: bool) -> Iterator[Tile]:
    """One tile a head slice of a projection, uncut; the biases after the weights."""
    site = Site(layer.index, projection.module)
    for piece in projection.slices:
        yield Tile(site, piece.block, piece.head, piece.rect)
    if not (include_bias and projection.has_bias):
        return
    for piece in projection.slices:
        if piece.block != "O":
            yield Tile(site, piece.block, piece.head, Rect(piece.rect.row, piece.rect.row_end, 0, 1), bias=True)
    if any(piece.block == "O" for piece in projection.slices):
        yield Tile(site, SHARED_O_BIAS, 0, Rect.of_shape(projection.shape[0], 1), bias=True)


def _check_disjoint(tiles: Sequence[Tile]) -> None:
    """Raise where two head slices of one parameter share an element: it would count twice."""
    for (site, bias), group in groupby(tiles, key=lambda tile: (tile.site, tile.bias)):
        if overlap := first_overlap(tile.rect for tile in group):
            raise QkovError(
                f"{site.module}.{'bias' if bias else 'weight'}",
                expected="head slices that share no element",
                got=f"{overlap[0]} and {overlap[1]}",
                remedy="Correct the registered layout: every element belongs to at most one head.",
            )


def _whole(projection: Projection, bias: bool) -> tuple[Rect, ...]:
    return (projection.whole(bias),)


def _no_such_layer(index: int, layout: Layout) -> QkovError:
    other = next((o for o in layout.others if o.index == index), None)
    return QkovError(
        "metric.layers",
        expected=f"layers with softmax attention among 0 to {layout.num_layers - 1}",
        got=f"{index}" + (f" ({other.kind}: {other.reason})" if other else ""),
        remedy="Choose other layers; `qkov inspect MODEL` lists them.",
    )
