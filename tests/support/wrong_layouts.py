"""Layouts that are wrong in every way in which one can be: heads, blocks and rows exchanged or shifted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from qkov_dist.layout.heads import AttentionLayer, HeadSlice, Layout, Projection
from qkov_dist.layout.rects import Rect


def edited(layout: Layout, layer: AttentionLayer, edit: Callable[[Projection, HeadSlice], HeadSlice]) -> Layout:
    """A layout of this one layer with every slice edited."""
    projections = tuple(replace(p, slices=tuple(edit(p, s) for s in p.slices)) for p in layer.projections)
    return replace(layout, layers=(replace(layer, projections=projections),))


def permuted(layout: Layout, layer: AttentionLayer, block: str) -> Layout:
    """Heads of a block named in turn: for K and V, query head h is said to use another kv head than h // G."""
    count = len(layer.heads(block))
    return edited(layout, layer, lambda _, s: replace(s, head=(s.head + 1) % count) if s.block == block else s)


def relabelled(layout: Layout, layer: AttentionLayer, names: dict[str, str]) -> Layout:
    return edited(layout, layer, lambda _, s: replace(s, block=names.get(s.block, s.block)))


def shifted(layout: Layout, layer: AttentionLayer, block: str) -> Layout:
    """Every slice of a block one row (O: one column) too far."""

    def shift(projection: Projection, piece: HeadSlice) -> HeadSlice:
        if piece.block != block:
            return piece
        r, (num_rows, num_cols) = piece.rect, projection.shape
        if block == "O":
            return replace(piece, rect=Rect(r.row, r.row_end, r.col + 1, min(r.col_end + 1, num_cols)))
        return replace(piece, rect=Rect(r.row + 1, min(r.row_end + 1, num_rows), r.col, r.col_end))

    return edited(layout, layer, shift)


def wrong_layouts(layout: Layout, layer: AttentionLayer) -> Iterator[tuple[str, Layout]]:
    for block in layer.blocks:
        if len(layer.heads(block)) > 1:
            yield f"{block} permuted", permuted(layout, layer, block)
            yield f"{block} shifted", shifted(layout, layer, block)
    inputs = [block for block in layer.blocks if block != "O"]
    for a, b in combinations(inputs, 2):
        if len(layer.heads(a)) == len(layer.heads(b)):
            yield f"{a} and {b} exchanged", relabelled(layout, layer, {a: b, b: a})
    for a in inputs:
        for b in "QKV":
            if a != b and len(layer.heads(a)) == len(layer.heads(b)):
                yield f"{a} called {b}", relabelled(layout, layer, {a: b})
