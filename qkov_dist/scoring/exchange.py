"""Factors on their way from the ranks that ran the samples to those that own the weights, a layer for each at a time.

Every data-parallel rank holds all features of its own samples. An owner of some rows and columns of a weight needs
those features of D and X for all samples: it is sent each of them at most once, and a rank is sent one layer at a time.
Where all ranks score on GPUs and their group has a back end for these, factors go from one GPU's memory into another's.
Samples keep the order of the data-parallel ranks, so that every rank sees one and the same index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, SampleIndex, Whole
from qkov_dist.capture.store import FactorStore
from qkov_dist.distributed.ownership import Owned
from qkov_dist.distributed.topology import Topology
from qkov_dist.distributed.world import World
from qkov_dist.layout.heads import AttentionLayer, Layout, Projection, Site
from qkov_dist.layout.rects import Rect, merged

from .schedule import Round
from .site_inputs import FactorSource
from .tiles import Tile, TilePlan

Features = tuple[int, int]
NONE: Features = (0, 0)


@dataclass(frozen=True)
class Need:
    """What a rank needs of one factor: X at some input features, D at some output features, or gradients at both.

    Attributes:
        kind: ``x``, ``d`` or ``g``.
        site: Whose factor it is.
        rows: Output features.
        cols: Input features.
    """

    kind: str
    site: Site
    rows: Features = (0, 0)
    cols: Features = (0, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what one row of the factor comes to."""
        height, width = self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]
        return {"x": (width,), "d": (height,), "g": (height, width + 1)}[self.kind]


@dataclass
class _Received:
    """One layer's factors of all samples, at the features that this rank owns."""

    indexes: Mapping[int | None, SampleIndex]
    threshold: Callable[[Site], int | None]
    sharing: Mapping[Site, Site]
    arrived: dict[tuple[str, Site], tuple[Need, Tensor]] = field(default_factory=dict)

    def sample_index(self, site: Site) -> SampleIndex:
        return self.indexes[self.threshold(site)]

    def x_site(self, site: Site) -> Site:
        return self.sharing[site]

    def x(self, site: Site) -> FeatureSlice:
        need, values = self.arrived["x", self.sharing[site]]
        return FeatureSlice(values, need.cols[0])

    def d(self, site: Site) -> FeatureSlice:
        need, values = self.arrived["d", site]
        return FeatureSlice(values, need.rows[0])

    def g(self, site: Site) -> Whole | None:
        if ("g", site) not in self.arrived:
            return None
        need, values = self.arrived["g", site]
        return Whole(values, need.rows[0], need.cols[0])


class Exchange:
    """Brings factors to the owners of their layers; all ranks make the same calls in the same order.

    Args:
        topology: The ranks.
        store: The factors of the samples that this rank ran.
        layout: The layers.
        tile_plan: What is scored.
        device: Where this rank scores.
    """

    def __init__(
        self,
        topology: Topology,
        store: FactorStore,
        layout: Layout,
        tile_plan: TilePlan,
        device: torch.device | str = "cpu",
    ) -> None:
        self.topology, self.store, self._layout = topology, store, layout
        self._scored = {layer.layer: layer.scored() for layer in tile_plan.layers}
        self._seen: dict[tuple[Site, bool], tuple[Rect, ...]] = {}
        self.bytes_sent = 0
        if topology.dp_group.size == 1:
            return
        self._group, self._device = _carrier(topology.dp_group, torch.device(device))
        described = self._group.all_gather(store.describe())
        self._sharing = {_site(site): _site(shared) for d in described for site, shared in d["sharing"]}
        self._dtypes = {
            (kind, _site(site)): getattr(torch, name) for d in described for kind, site, name in d["row_buffers"]
        }
        self._by_dp_rank = [_indexes(d["indexes"]) for d in described]
        self._indexes = {
            above: _joined([indexes[above] for indexes in self._by_dp_rank]) for above in self._by_dp_rank[0]
        }

    @contextmanager
    def round(self, turn: Round) -> Iterator[FactorSource | None]:
        """The factors of this rank's layer, for as long as the block lasts; None where it has none.

        Args:
            turn: The layer that each rank scores now.
        """
        has_layer = turn[self.topology.world.rank] is not None
        if self.topology.dp_group.size == 1:
            yield self.store if has_layer else None
            return
        received = self._collect(turn)
        yield received if has_layer else None
        received.arrived.clear()

    def seen(self, tile: Tile) -> tuple[Rect, ...]:
        """What the data-parallel group owns of a tile's parameter: what this rank counts of its own samples."""
        if self.topology.dp_group.size == self.topology.world.size:
            return (tile.rect,)
        if (tile.site, tile.bias) not in self._seen:
            layer = self._layout.layer(tile.site.layer)
            projection = next(p for p in layer.projections if p.module == tile.site.module)
            owned = (self.topology.owned_by(rank)(projection, tile.bias) for rank in self.topology.dp_ranks)
            self._seen[tile.site, tile.bias] = merged(rect for rects in owned for rect in rects)
        return self._seen[tile.site, tile.bias]

    def _collect(self, turn: Round) -> _Received:
        topology = self.topology
        by_dp_rank = [self._needs(turn[rank], rank) for rank in topology.dp_ranks]
        sent = [self._held_of(needs, to_other=r != topology.dp_group.rank) for r, needs in enumerate(by_dp_rank)]
        places = [(need, self._place(need)) for need in by_dp_rank[topology.dp_group.rank]]
        by_need = [self._by_sender(need, place) for need, place in places]
        received = [[parts[dp_rank] for parts in by_need] for dp_rank in range(topology.dp_group.size)]
        self.bytes_sent += sum(
            part.nbytes for r, parts in enumerate(sent) if r != topology.dp_group.rank for part in parts
        )
        self._group.send_recv(sent, received)
        arrived = {(need.kind, need.site): (need, place) for need, place in places}
        return _Received(self._indexes, self.store.threshold, self._sharing, arrived)

    def _needs(self, layer: int | None, rank: int) -> list[Need]:
        """What a rank needs; factors that no sample is in are left out."""
        if layer is None:
            return []
        owned = self.topology.owned_by(rank)
        needs = needs_of(self._layout.layer(layer), self._scored[layer], owned, self._sharing)
        return [need for need in needs if need.kind != "g" or self._indexes[self.store.threshold(need.site)].whole]

    def _place(self, need: Need) -> Tensor:
        """Where a factor of all samples comes to lie, one data-parallel rank after another."""
        dtype = self._dtypes.get((need.kind, need.site), torch.float32)  # of no rows at all, none is known
        return torch.empty(self._num_rows(need, self._indexes), *need.shape, dtype=dtype, device=self._device)

    def _by_sender(self, need: Need, place: Tensor) -> tuple[Tensor, ...]:
        """The part of it that each data-parallel rank sends."""
        return torch.split(place, [self._num_rows(need, indexes) for indexes in self._by_dp_rank])

    def _held_of(self, needs: Sequence[Need], *, to_other: bool) -> list[Tensor]:
        """This rank's samples at the features that a rank needs: X and D in memory as they lie, where it needs all."""
        mine = self._by_dp_rank[self.topology.dp_group.rank]
        held = [self._held(need) if self._num_rows(need, mine) else torch.empty(0, *need.shape) for need in needs]
        return [part.contiguous() for part in held] if to_other else held

    def _held(self, need: Need) -> Tensor:
        """What a rank needs, of this rank's samples."""
        rows, cols = slice(*need.rows), slice(*need.cols)
        if need.kind == "x":
            return self.store.x(need.site).features(cols)
        if need.kind == "d":
            return self.store.d(need.site).features(rows)
        whole = self.store.g(need.site)
        assert whole is not None  # there are rows of it
        return torch.cat([whole.rect(rows, cols), whole.bias(rows)], dim=-1)

    def _num_rows(self, need: Need, indexes: Mapping[int | None, SampleIndex]) -> int:
        index = indexes[self.store.threshold(need.site)]
        return len(index.whole) if need.kind == "g" else index.num_rows


def _carrier(group: World, device: torch.device) -> tuple[World, torch.device]:
    """How factors go between ranks, and where they come to lie: on GPUs, or in the host's memory; on all alike."""
    if all(group.all_gather(device.type != "cpu" and group.carries(device.type))):
        return group.over(device), device
    return group, torch.device("cpu")


def needs_of(
    layer: AttentionLayer,
    scored: Mapping[tuple[Site, bool], tuple[Rect, ...]],
    owned: Owned,
    sharing: Mapping[Site, Site],
) -> list[Need]:
    """What a rank needs of a layer: for each factor, the features between the first and the last that it scores.

    Args:
        layer: The layer.
        scored: :meth:`~qkov_dist.scoring.tiles.LayerTiles.scored`.
        owned: What the rank owns.
        sharing: Site -> whose X it reads.
    """
    outputs: dict[Site, Features] = {}
    inputs: dict[Site, Features] = {}
    wholes: list[Need] = []
    for projection in layer.projections:
        site = Site(layer.index, projection.module)
        weight, bias = (_common(scored.get((site, b), ()), owned, projection, b) for b in (False, True))
        rows = [(rect.row, rect.row_end) for rect in (*weight, *bias)]
        cols = [(rect.col, rect.col_end) for rect in weight]
        if not rows:
            continue
        shared, wide = sharing[site], _hull(cols)
        outputs[site] = _hull(rows)
        inputs[shared] = _hull([part for part in (wide, inputs.get(shared, NONE)) if part != NONE])
        wholes.append(Need("g", site, _hull(rows), wide))
    return [
        *(Need("x", site, cols=part) for site, part in sorted(inputs.items())),
        *(Need("d", site, rows=part) for site, part in sorted(outputs.items())),
        *sorted(wholes, key=lambda need: need.site),
    ]


def _common(scored: Sequence[Rect], owned: Owned, projection: Projection, bias: bool) -> list[Rect]:
    """What a rank owns of what is scored."""
    pieces = owned(projection, bias) if scored else ()
    return [common for piece in pieces for rect in scored if (common := piece.intersect(rect))]


def _hull(intervals: Sequence[Features]) -> Features:
    if not intervals:
        return NONE  # of a bias alone
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _indexes(described: Sequence[Sequence[Any]]) -> dict[int | None, SampleIndex]:
    """A rank's sample indexes, by threshold."""
    indexes = {}
    for above, spans, whole, num_rows in described:
        places = {number: place for place, number in enumerate(whole)}
        indexes[above] = SampleIndex({number: (start, stop) for number, start, stop in spans}, places, num_rows)
    return indexes


def _joined(by_dp_rank: Sequence[SampleIndex]) -> SampleIndex:
    """One index over the rows of all data-parallel ranks, one after another."""
    joined = SampleIndex()
    for index in by_dp_rank:
        for number, (start, stop) in index.spans.items():
            joined.spans[number] = (joined.num_rows + start, joined.num_rows + stop)
        first = len(joined.whole)
        joined.whole.update({number: first + place for number, place in index.whole.items()})
        joined.num_rows += index.num_rows
    return joined


def _site(raw: Sequence[object]) -> Site:
    layer, module = raw
    return Site(int(str(layer)), str(module))
