r"""The sum of I over whole blocks, which a relative ridge is a multiple of: from factors, before a layer is scored.

    sum_p I[p] = sum_n w_n ||g_n||^2,      ||D^T X||^2 = sum_{s,t} (D D^T)_{st} (X X^T)_{st}

The right side costs T^2 (rows + cols) in place of T rows cols operations, and X X^T is formed once for the projections
that share X; where forming the gradient itself costs less, that is done. Its terms cancel where a gradient is small
beside its factors: ||g||^2 is at most (sum_t |d_t| |x_t|)^2, and where it is less than 1/256 of that, its sample's
products are formed again in float64. (Of SmolLM2's gradients on code the least is 1/117, and float32 is off by at most
7e-7.) Norms of disjoint rectangles and of different samples add up: a rank looks at the samples that it ran, as they
lie in its own store, and nothing is sent but one number a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, Whole
from qkov_dist.capture.numerics import products_as
from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect

from .padded_groups import PaddedGroup, order_samples
from .settings import Roles, ScoreSettings
from .site_inputs import FactorSource
from .tiles import LayerTiles, Tile

BlockTotals = dict[str, float]
Seen = Callable[[Tile], Iterable[Rect]]  # the rectangles of a tile's parameter that a process looks at
CHUNK_BYTES = 32 * 2**20  # of a projection's factors or gradients at a time
CANCELLED = 1 / 256  # of the most that a squared norm can be; below, float32 keeps too few of its digits


@dataclass(frozen=True)
class Part:
    """A part of one block in one projection: every pair of these rows and columns; of a bias, the rows.

    Attributes:
        block: The block.
        rows: Output features.
        cols: Input features; none of a bias.
    """

    block: str
    rows: tuple[int, ...]
    cols: tuple[int, ...] = ()


def block_totals(
    layer_tiles: LayerTiles,
    source: FactorSource,
    roles: Roles,
    settings: ScoreSettings,
    seen: Seen | None = None,
) -> BlockTotals:
    """One layer's sum of I over each whole block, as far as samples are in ``source`` and elements are ``seen``.

    Args:
        layer_tiles: The layer.
        source: Factors of all samples, or of some; those that it does not have count nothing.
        roles: The samples and their weights in I.
        settings: Where products are formed, and how.
        seen: What this process looks at; everything by default.
    """
    totals = dict.fromkeys(layer_tiles.block_sizes, 0.0)
    weights = roles.weights.sum(0) if roles.scales is None else roles.weights.sum(0) * roles.scales**2
    with products_as("highest", settings.device):  # terms cancel
        slices = [tile for tile in layer_tiles.slices if tile.site in layer_tiles.sites]
        found = block_squares(slices, source, roles.members, np.flatnonzero(weights).tolist(), settings.device, seen)
        for block, members, squares in found:
            totals[block] += float(squares @ torch.from_numpy(weights[members]))
    return totals


def block_squares(
    tiles: Sequence[Tile],
    source: FactorSource,
    members: Sequence[int],
    wanted: Sequence[int],
    device: torch.device | str,
    seen: Seen | None = None,
) -> Iterator[tuple[str, list[int], Tensor]]:
    """Squared norms of samples' gradients of one layer, part by part: a block, positions of members, float64 [n].

    What a block's parts add up to is the whole, for each member.

    Args:
        tiles: What of the layer counts.
        source: Factors of all samples, or of some; nothing comes of those that it does not have.
        members: The samples, by number.
        wanted: Positions of those that are looked at.
        device: Where products are formed.
        seen: What this process looks at; everything by default.
    """
    sites = sorted({tile.site for tile in tiles})
    parts = {site: block_parts([tile for tile in tiles if tile.site == site], seen) for site in sites}
    by_input: dict[Site, list[Site]] = {}
    for site in (site for site, of_site in parts.items() if of_site):
        by_input.setdefault(source.x_site(site), []).append(site)
    for together in by_input.values():
        yield from _squares(source, together, parts, members, wanted, torch.device(device))


def block_parts(tiles: Sequence[Tile], seen: Seen | None = None) -> list[Part]:
    """A projection's part of each block, in as few parts as its rows and columns allow."""
    found: dict[tuple[str, bool], list[Rect]] = {}
    for tile in tiles:
        for piece in (tile.rect,) if seen is None else seen(tile):
            if common := tile.rect.intersect(piece):
                found.setdefault((tile.block, tile.bias), []).append(common)
    return [
        Part(block, rows, () if bias else cols)
        for (block, bias), rects in found.items()
        for rows, cols in _joined([(range(r.row, r.row_end), range(r.col, r.col_end)) for r in rects])
    ]


def _joined(pieces: Iterable[tuple[Iterable[int], Iterable[int]]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Disjoint rectangles put together: those of the same columns, then those of the same rows."""
    by_cols: dict[tuple[int, ...], list[int]] = {}
    for rows, cols in pieces:
        by_cols.setdefault(tuple(cols), []).extend(rows)
    by_rows: dict[tuple[int, ...], list[int]] = {}
    for cols, rows in by_cols.items():
        by_rows.setdefault(tuple(sorted(rows)), []).extend(cols)
    return [(rows, tuple(sorted(cols))) for rows, cols in by_rows.items()]


def _squares(
    source: FactorSource,
    sites: Sequence[Site],
    parts: Mapping[Site, Sequence[Part]],
    members: Sequence[int],
    wanted: Sequence[int],
    device: torch.device,
) -> Iterator[tuple[str, list[int], Tensor]]:
    """The same at projections that share an input."""
    sample_index = source.sample_index(sites[0])
    here = [n for n in wanted if members[n] in sample_index.spans or members[n] in sample_index.whole]
    ordering = order_samples([members[n] for n in here], sample_index, ())
    x, outputs, kept = source.x(sites[0]), {s: source.d(s) for s in sites}, {s: source.g(s) for s in sites}
    for group in ordering.groups:
        of_group = [here[n] for n in ordering.order[group.first : group.last]]
        if group.real is None:
            for site in sites:
                whole = kept[site]
                for block, squares in _of_kept(group, whole, parts[site]):  # type: ignore[arg-type]
                    yield block, of_group, squares
            continue
        inputs = FeatureSlice(group.inputs(x.values), x.start)
        of_sites = {site: FeatureSlice(group.outputs(d.values), d.start) for site, d in outputs.items()}
        widest = max(sweep.values.shape[2] for sweep in (inputs, *of_sites.values()))
        for chunk in _chunks(len(of_group), 8 * group.length * widest):
            products = _Products(inputs.values[chunk].to(device), inputs.start, len(sites))
            for site, d in of_sites.items():
                of_d = d.values[chunk].to(device)
                for part in parts[site]:
                    squares = products.squares(_features(of_d, part.rows, d.start), part.cols)
                    yield part.block, of_group[chunk], squares.cpu()


def _of_kept(group: PaddedGroup, whole: Whole, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    """The same of samples that are kept as gradients."""
    values = whole.values[group.rows.to(whole.values.device)]
    for part in parts:
        rows = _features(values.mT, part.rows, whole.row).mT
        of_part = _features(rows[..., :-1], part.cols, whole.col) if part.cols else rows[..., -1:]
        yield part.block, _square_norms(of_part).cpu()


class _Products:
    """X of some samples, [n, T, in], and the Gram matrices of it that several projections need."""

    def __init__(self, x: Tensor, start: int, num_sites: int) -> None:
        self._x, self._start, self._num_sites = x, start, num_sites
        self._grams: dict[tuple[int, ...], Tensor] = {}

    def squares(self, d: Tensor, cols: tuple[int, ...]) -> Tensor:
        """||D^T X||^2 of each sample, float64 [n], for D [n, T, rows] and some columns of X; of a bias without any."""
        if not cols:
            return _square_norms(d.to(_at_least_float32(d.dtype)).sum(1))
        length, num_rows = d.shape[1:]
        if gram_is_cheaper(length, num_rows, len(cols), self._num_sites):
            return self._by_grams(d, cols)
        x = _features(self._x, cols, self._start)
        dtype = _at_least_float32(d.dtype)
        squares = d.new_zeros(len(d), dtype=torch.float64)
        for rows in _chunks(num_rows, len(d) * len(cols) * dtype.itemsize):
            squares += _square_norms(torch.bmm(d[..., rows].to(dtype).mT, x.to(dtype)))
        return squares

    def _by_grams(self, d: Tensor, cols: tuple[int, ...]) -> Tensor:
        of_d, of_x = _gram(d), self._gram_of(cols)
        squares = (of_d * of_x).sum((1, 2), dtype=torch.float64)
        most = (_squares_of_rows(of_d) * _squares_of_rows(of_x)).sqrt().sum(1, dtype=torch.float64).square()
        if of_d.dtype != torch.float64 and (cancelled := (squares < CANCELLED * most).nonzero()[:, 0]).numel():
            again = (_gram(values[cancelled].double()) for values in (d, _features(self._x, cols, self._start)))
            squares[cancelled] = torch.mul(*again).sum((1, 2))
        return squares

    def _gram_of(self, cols: tuple[int, ...]) -> Tensor:
        if cols not in self._grams:
            self._grams[cols] = _gram(_features(self._x, cols, self._start))
        return self._grams[cols]


def gram_is_cheaper(length: int, num_rows: int, num_cols: int, num_sites: int) -> bool:
    """Whether Gram matrices of T tokens, X's shared by some projections, take less than the gradient itself."""
    return length * (num_rows + num_cols / num_sites) < num_rows * num_cols


def norm_flops(length: int, num_rows: int, num_cols: int, num_sites: int) -> int:
    """Operations of one sample's norm; of X's Gram matrix a projection's part."""
    if gram_is_cheaper(length, num_rows, num_cols, num_sites):
        return 2 * length * length * (num_rows + num_cols // num_sites)
    return 2 * length * num_rows * num_cols


def _gram(values: Tensor) -> Tensor:
    wide = values.to(_at_least_float32(values.dtype))
    return torch.bmm(wide, wide.mT)


def _squares_of_rows(gram: Tensor) -> Tensor:
    """What rows' products with themselves are, never below 0."""
    return gram.diagonal(dim1=1, dim2=2).clamp_min(0)


def _square_norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64)
    return norms.square()


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _features(values: Tensor, wanted: tuple[int, ...], start: int) -> Tensor:
    """Some features along the last axis, a view where they lie one behind another."""
    first, last = wanted[0], wanted[-1]
    if last - first + 1 == len(wanted):
        return FeatureSlice(values, start).features(slice(first, last + 1))
    return values[..., torch.tensor(wanted, device=values.device) - start]


def _chunks(num: int, num_bytes: int) -> Iterator[slice]:
    """Slices of ``num`` things, as many at a time as may be worked on, each of so many bytes."""
    step = max(CHUNK_BYTES // max(num_bytes, 1), 1)
    return (slice(start, min(start + step, num)) for start in range(0, num, step))
