r"""The sum of I over whole blocks, which a relative ridge is a multiple of: from factors, before a layer is scored.

    sum_p I[p] = sum_n w_n ||g_n||^2

with norms by :mod:`~qkov_dist.scoring.gram_norms`. Those whose terms cancel are formed again in float64, once all
others have left the device. Norms of disjoint rectangles and of different samples add up: a rank looks at the samples
that it ran, as they lie in its own store, and nothing is sent but one number a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, Whole
from qkov_dist.capture.numerics import products_as
from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect
from qkov_dist.memory import moved

from .gram_norms import GramProducts, chunks, features_of, gram, square_norms
from .native_kernel import NativeKernel
from .padded_groups import PaddedGroup, order_samples
from .settings import Roles, ScoreSettings
from .site_inputs import FactorSource, room_for_factors
from .tiles import LayerTiles, Tile

BlockTotals = dict[str, float]
Seen = Callable[[Tile], Iterable[Rect]]  # the rectangles of a tile's parameter that a process looks at


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
        found = block_squares(slices, source, roles.members, np.flatnonzero(weights).tolist(), settings, seen)
        for block, members, squares in found:
            totals[block] += float(squares @ torch.from_numpy(weights[members]))
    return totals


def block_squares(
    tiles: Sequence[Tile],
    source: FactorSource,
    members: Sequence[int],
    wanted: Sequence[int],
    settings: ScoreSettings,
    seen: Seen | None = None,
) -> Iterator[tuple[str, list[int], Tensor]]:
    """Squared norms of samples' gradients of one layer, part by part: a block, positions of members, float64 [n].

    What a block's parts add up to is the whole, for each member.

    Args:
        tiles: What of the layer counts.
        source: Factors of all samples, or of some; nothing comes of those that it does not have.
        members: The samples, by number.
        wanted: Positions of those that are looked at.
        settings: Where products are formed, and by what.
        seen: What this process looks at; everything by default.

    Raises:
        QkovError: where factors do not fit into a GPU's memory beside what is there.
    """
    sites = sorted({tile.site for tile in tiles})
    parts = {site: block_parts([tile for tile in tiles if tile.site == site], seen) for site in sites}
    by_input: dict[Site, list[Site]] = {}
    for site in (site for site, of_site in parts.items() if of_site):
        by_input.setdefault(source.x_site(site), []).append(site)
    for together in by_input.values():
        with room_for_factors(together[0].layer, settings.device):
            found = list(_squares(source, together, parts, members, wanted, settings))
        yield from found


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


@dataclass(frozen=True)
class _Norms:
    """Squared norms of some samples' gradients in one part, where they were formed.

    Attributes:
        part: The part.
        samples: Which they are of an ordering.
        squares: float64 [n]; 0 where ``cancelled``.
        cancelled: Whose terms cancel too far for float32, bool [n]; None where none's do.
        again: Forms the squares of some of the n in float64.
    """

    part: Part
    samples: slice
    squares: Tensor
    cancelled: Tensor | None = None
    again: Callable[[list[int]], Tensor] = lambda places: torch.empty(0)


def _squares(
    source: FactorSource,
    sites: Sequence[Site],
    parts: Mapping[Site, Sequence[Part]],
    members: Sequence[int],
    wanted: Sequence[int],
    settings: ScoreSettings,
) -> Iterator[tuple[str, list[int], Tensor]]:
    """The same at projections that share an input; all leaves a GPU at once."""
    sample_index, device = source.sample_index(sites[0]), torch.device(settings.device)
    here = [n for n in wanted if members[n] in sample_index.spans or members[n] in sample_index.whole]
    ordering = order_samples([members[n] for n in here], sample_index, ()).to(device)
    factors = _Factors.at(source, sites, parts, settings)
    norms = [found for group in ordering.groups for found in factors.norms(group)]
    blocks = sorted({found.part.block for found in norms})
    sums = torch.zeros(len(blocks), len(here), dtype=torch.float64, device=device)
    for found in norms:
        sums[blocks.index(found.part.block), found.samples] += found.squares
    squares = _with_cancelled(sums, norms, blocks)
    places = [here[n] for n in ordering.order]
    yield from ((block, places, of_block) for block, of_block in zip(blocks, squares, strict=True))


def _with_cancelled(sums: Tensor, norms: Sequence[_Norms], blocks: Sequence[str]) -> Tensor:
    """Sums [blocks, n] on the CPU, with what has to be formed again in float64; a GPU is waited for once, or twice."""
    doubtful = [found for found in norms if found.cancelled is not None]
    flags = [found.cancelled.double() for found in doubtful if found.cancelled is not None]
    on_host = torch.cat([sums.flatten(), *flags]).cpu()
    totals = on_host[: sums.numel()].view(sums.shape)
    again: list[tuple[_Norms, list[int], Tensor]] = []
    for found, of_found in zip(doubtful, torch.split(on_host[sums.numel() :], list(map(len, flags))), strict=True):
        if places := of_found.nonzero()[:, 0].tolist():
            again.append((found, places, found.again(places)))
    if again:
        squares = torch.cat([formed for *_, formed in again]).cpu()
        for (found, places, _), formed in zip(again, torch.split(squares, [len(p) for _, p, _ in again]), strict=True):
            totals[blocks.index(found.part.block), found.samples][places] += formed
    return totals


@dataclass(frozen=True)
class _Factors:
    """What a layer has at projections that share an input: X, and of each D and the gradients that are kept."""

    x: FeatureSlice
    outputs: Mapping[Site, FeatureSlice]
    kept: Mapping[Site, Whole | None]
    parts: Mapping[Site, Sequence[Part]]
    device: torch.device
    kernel: NativeKernel | None

    @staticmethod
    def at(
        source: FactorSource, sites: Sequence[Site], parts: Mapping[Site, Sequence[Part]], settings: ScoreSettings
    ) -> _Factors:
        """Factors on a device as they are stored, gradients where they lie."""
        device = torch.device(settings.device)
        outputs = {site: source.d(site).to(device) for site in sites}
        kept = {site: source.g(site) for site in sites}
        return _Factors(source.x(sites[0]).to(device), outputs, kept, parts, device, settings.kernel)

    def norms(self, group: PaddedGroup) -> Iterator[_Norms]:
        """Of a group of samples, some at a time, every part of every projection."""
        if group.real is None:
            for site, whole in self.kept.items():
                yield from self._of_kept(group, whole, self.parts[site])  # type: ignore[arg-type]
            return
        inputs = group.inputs(self.x.values)
        of_sites = {site: group.outputs(d.values) for site, d in self.outputs.items()}
        widest = max(values.shape[2] for values in (inputs, *of_sites.values()))
        for chunk in chunks(group.last - group.first, 8 * group.length * widest):
            samples = slice(group.first + chunk.start, group.first + chunk.stop)
            products = GramProducts(inputs[chunk], self.x.start, len(of_sites), self.kernel)
            for site, d in of_sites.items():
                for part in self.parts[site]:
                    of_part = features_of(d[chunk], part.rows, self.outputs[site].start)
                    again = partial(self._in_float64, group, chunk.start, site, part)
                    yield _Norms(part, samples, *products.squares(of_part, part.cols), again)

    def _in_float64(self, group: PaddedGroup, first: int, site: Site, part: Part, places: list[int]) -> Tensor:
        """||D^T X||^2 of some samples of a group, by their places from the ``first`` on."""
        few = group.only([first + place for place in places])
        d, x = few.outputs(self.outputs[site].values), few.inputs(self.x.values)
        of_d = gram(features_of(d, part.rows, self.outputs[site].start).double())
        return of_d.mul_(gram(features_of(x, part.cols, self.x.start).double())).sum((1, 2))

    def _of_kept(self, group: PaddedGroup, whole: Whole, parts: Sequence[Part]) -> Iterator[_Norms]:
        """The same of samples that are kept as gradients."""
        rows = moved(group.rows, whole.values.device)
        for chunk in chunks(len(rows), whole.values[0].nbytes):
            values = moved(whole.values[rows[chunk]], self.device)
            samples = slice(group.first + chunk.start, group.first + chunk.stop)
            for part in parts:
                of_rows = features_of(values.mT, part.rows, whole.row).mT
                of_part = features_of(of_rows[..., :-1], part.cols, whole.col) if part.cols else of_rows[..., -1:]
                yield _Norms(part, samples, square_norms(of_part))
