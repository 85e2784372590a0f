"""Factors or gradient: which of the two is smaller while a sample waits for its layer to be scored.

A sample of T tokens leaves T (I + O) numbers as the factors X and D of a projection [O, I], where projections that read
the same input keep one X, and O (I + 1) as its gradient with that of its bias. Integers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from qkov_dist.layout.heads import AttentionLayer, Site
from qkov_dist.layout.rects import Rect

GRADIENT_BYTES = 4  # of one element: gradients are kept in float32


def shared_inputs(layer: AttentionLayer, sites: Collection[Site] | None = None) -> list[list[tuple[Site, Rect]]]:
    """Projections by the input they read, each with its shape as [out, in].

    Q, K and V are taken to read one input where it is as wide; capture finds out what they really share.

    Args:
        layer: The layer.
        sites: Its projections that are captured, perhaps among others; all by default.
    """
    groups: dict[tuple[bool, int], list[tuple[Site, Rect]]] = {}
    for projection in layer.projections:
        site = Site(layer.index, projection.module)
        if sites is None or site in sites:
            key = "O" in projection.blocks, projection.shape[1]
            groups.setdefault(key, []).append((site, projection.whole()))
    return list(groups.values())


def gradients_above(layers: Iterable[AttentionLayer], itemsize: int) -> dict[Site, int]:
    """By site, the number of tokens above which a sample's gradients are smaller than its factors.

    Args:
        layers: The layers.
        itemsize: Bytes of one number of a factor.
    """
    return {
        site: _gradient_bytes(group) // _token_bytes(group, itemsize)
        for layer in layers
        for group in shared_inputs(layer)
        for site, _ in group
    }


def factor_bytes(
    layer: AttentionLayer,
    sites: Collection[Site],
    lengths: Sequence[int],
    itemsize: int,
    tp_rects: Mapping[Site, Rect] | None = None,
) -> int:
    """Bytes in which the factors of some samples wait, each sample in the smaller form.

    Args:
        layer: The layer.
        sites: Its projections that are captured, perhaps among others.
        lengths: Tokens of each sample.
        itemsize: Bytes of one number of a factor.
        tp_rects: The tensor-parallel shard that this rank sees of a projection, [out, in].
    """
    total, above = 0, gradients_above([layer], itemsize)
    for group in shared_inputs(layer, sites):
        seen = [(site, (tp_rects or {}).get(site, rect)) for site, rect in group]
        whole, token = _gradient_bytes(seen), _token_bytes(seen, itemsize)
        threshold = above[group[0][0]]
        total += sum(whole if length > threshold else token * length for length in lengths)
    return total


def _token_bytes(group: Sequence[tuple[Site, Rect]], itemsize: int) -> int:
    return itemsize * (max(rect.shape[1] for _, rect in group) + sum(rect.shape[0] for _, rect in group))


def _gradient_bytes(group: Sequence[tuple[Site, Rect]]) -> int:
    return GRADIENT_BYTES * sum(rect.shape[0] * (rect.shape[1] + 1) for _, rect in group)
