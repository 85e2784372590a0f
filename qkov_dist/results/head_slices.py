"""Where each head lies among a model's parameters, as a heatmap's file says it, in the attribute ``slices``.

One record a parameter, for every layer with attention:

    {"layer": 14, "parameter": "model.layers.14.self_attn.q_proj.weight", "shape": [576, 576], "transposed": false,
     "heads": {"Q": [[0, 9, 0, 64]]}}

``shape`` is that of the parameter as it is stored: [out, in], or [in, out] where ``transposed``. A band ``[first,
count, start, size]`` says of ``count`` heads that head ``first + n`` has ``size`` features from ``start + n * size``
on: outputs of Q, K and V, inputs of O. Names are those of the plain model, without what wraps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qkov_dist.layout.heads import BLOCKS, HeadSlice, Layout, Projection
from qkov_dist.layout.names import plain_name

Axis = Literal["rows", "cols"]
Heads = Mapping[tuple[str, int, int], tuple["HeadRange", ...]]
_SMALLEST = (0, 1, 0, 1)  # of [first, count, start, size]


@dataclass(frozen=True, order=True)
class HeadRange:
    """Rows or columns [start, stop) of a parameter as it is stored; those of a bias are rows."""

    parameter: str
    axis: Axis
    start: int
    stop: int


def slices_of(layout: Layout, *, include_bias: bool) -> list[dict[str, Any]]:
    """Every head of a layout as JSON values; ``include_bias`` says whether a head has its part of the bias."""
    return [
        record
        for layer in layout.layers
        for projection in layer.projections
        for record in _records(layer.index, projection, with_bias=include_bias and projection.has_bias)
    ]


def _records(layer: int, projection: Projection, *, with_bias: bool) -> Iterator[dict[str, Any]]:
    name, (out, into) = plain_name(projection.module), projection.shape
    heads = {block: _bands(projection.slices, block) for block in projection.blocks}
    shape = [into, out] if projection.transposed else [out, into]
    weight = {"shape": shape, "transposed": projection.transposed, "heads": heads}
    yield {"layer": layer, "parameter": f"{name}.weight", **weight}
    own = {block: bands for block, bands in heads.items() if block != "O"}  # O's bias belongs to no head
    if with_bias and own:
        yield {"layer": layer, "parameter": f"{name}.bias", "shape": [out], "transposed": False, "heads": own}


def _bands(slices: Sequence[HeadSlice], block: str) -> list[list[int]]:
    """Heads that follow each other, each as long as the last, as one band."""
    bands: list[list[int]] = []
    for piece in slices:
        if piece.block != block:
            continue
        start, stop = (piece.rect.col, piece.rect.col_end) if block == "O" else (piece.rect.row, piece.rect.row_end)
        if bands:
            first, count, begin, size = bands[-1]
            if (piece.head, start, stop - start) == (first + count, begin + count * size, size):
                bands[-1][1] += 1
                continue
        bands.append([piece.head, 1, start, stop - start])
    return bands


def head_ranges(attributes: Mapping[str, Any]) -> Heads:
    """(block, layer, native head) -> where it lies; empty where the attributes do not say."""
    found: dict[tuple[str, int, int], tuple[HeadRange, ...]] = {}
    for record in attributes.get("slices", ()):
        for block, bands in record["heads"].items():
            axis: Axis = "rows" if (block != "O") != record["transposed"] else "cols"
            for first, count, start, size in bands:
                for n in range(count):
                    piece = HeadRange(record["parameter"], axis, start + n * size, start + (n + 1) * size)
                    key = (block, record["layer"], first + n)
                    found[key] = (*found.get(key, ()), piece)
    return found


def are_slices(value: object) -> bool:
    """Whether a value from a file is what :func:`slices_of` makes."""
    return isinstance(value, list) and all(map(_is_record, value))


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not {"layer", "parameter", "shape", "transposed", "heads"} <= record.keys():
        return False
    shape, heads = record["shape"], record["heads"]
    if not (_are_whole([record["layer"]]) and isinstance(record["parameter"], str) and isinstance(heads, dict)):
        return False
    if not (isinstance(shape, list) and len(shape) in (1, 2) and _are_whole(shape)):
        return False
    return type(record["transposed"]) is bool and all(
        block in BLOCKS and isinstance(bands, list) and all(_fits(band, max(shape)) for band in bands)
        for block, bands in heads.items()
    )


def _fits(band: object, most: int) -> bool:
    if not (isinstance(band, list) and len(band) == len(_SMALLEST) and _are_whole(band)):
        return False
    _, count, start, size = band
    return all(map(int.__ge__, band, _SMALLEST)) and start + count * size <= most


def _are_whole(numbers: Iterable[object]) -> bool:
    return all(type(number) is int and 0 <= number < 2**31 for number in numbers)
