"""Factors on their way from the ranks that ran the samples to those that own the weights, one layer at a time.

Every peer holds all features of its own samples. An owner of some rows and columns of a weight needs those features of
D and X for all samples: it is sent each of them at most once, and one layer is in flight at a time. Samples keep the
order of the peers, so that every rank sees one and the same table of spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .capture import Site
from .engine import FactorSource
from .factors import FactorStore, Window
from .geometry import Rect
from .plan import Owned
from .slices import AttentionLayer, Projection
from .team import Team

Features = tuple[int, int]


@dataclass(frozen=True)
class Need:
    """One series of a layer and the features of it that a rank needs: X at ``site``, or D."""

    kind: str
    site: Site
    features: Features


@dataclass
class _Received:
    """One layer's factors of all samples, at the features that this rank owns."""

    spans: Mapping[int, tuple[int, int]]
    sharing: Mapping[Site, Site]
    windows: dict[tuple[str, Site], Window] = field(default_factory=dict)

    def x_site(self, site: Site) -> Site:
        return self.sharing[site]

    def x(self, site: Site) -> Window:
        return self.windows["x", self.sharing[site]]

    def d(self, site: Site) -> Window:
        return self.windows["d", site]


class Exchange:
    """Brings every layer's factors to its owners; all peers make the same calls in the same order.

    Args:
        team: The ranks.
        store: The factors of the samples that this rank ran.
    """

    def __init__(self, team: Team, store: FactorStore) -> None:
        self._team, self._store = team, store
        self.bytes_sent = 0
        if team.peers.size == 1:
            return
        described = team.peers.gather(store.describe())
        known = next((d for d in described if d["series"]), described[0])
        self._sharing = {_site(a): _site(b) for a, b in known["sharing"]}
        self._dtypes = {(kind, _site(s)): getattr(torch, name) for kind, s, name in known["series"]}
        self._rows = [d["rows"] for d in described]
        self._spans = _joined([d["spans"] for d in described], self._rows)

    @contextmanager
    def layer(self, layer: AttentionLayer, sites: Sequence[Site]) -> Iterator[FactorSource]:
        """One layer's factors, for as long as the block lasts.

        Args:
            layer: The layer.
            sites: Its projections that are scored.
        """
        if self._team.peers.size == 1:
            yield self._store
            return
        received = self._collect(layer, sites)
        yield received
        received.windows.clear()

    def _collect(self, layer: AttentionLayer, sites: Sequence[Site]) -> _Received:
        team = self._team
        by_peer = [needs_of(layer, sites, team.owned_by(rank), self._sharing) for rank in team.peer_ranks]
        held = {key: self._window(*key) for key in {(n.kind, n.site) for needs in by_peer for n in needs}}
        parts = [_packed(needs, held) for needs in by_peer]
        mine = by_peer[team.peers.rank]
        self.bytes_sent += sum(part.numel() for r, part in enumerate(parts) if r != team.peers.rank)
        incoming = team.peers.exchange(parts)
        blocks = [self._unpacked(part, mine, rows) for part, rows in zip(incoming, self._rows, strict=True)]
        windows = {
            (need.kind, need.site): Window(torch.cat([block[n] for block in blocks]), need.features[0])
            for n, need in enumerate(mine)
        }
        return _Received(self._spans, self._sharing, windows)

    def _window(self, kind: str, site: Site) -> Window | None:
        """This rank's samples of one series; None where it ran no sample."""
        if not self._store.num_rows:
            return None
        return self._store.x(site) if kind == "x" else self._store.d(site)

    def _unpacked(self, data: Tensor, needs: Sequence[Need], num_rows: int) -> list[Tensor]:
        tensors, start = [], 0
        for need in needs:
            dtype, width = self._dtypes[need.kind, need.site], need.features[1] - need.features[0]
            size = num_rows * width * dtype.itemsize
            # a copy: bytes received one after another need not be aligned for a wider type
            tensors.append(data[start : start + size].clone().view(dtype).view(num_rows, width))
            start += size
        return tensors


def _packed(needs: Sequence[Need], held: Mapping[tuple[str, Site], Window | None]) -> Tensor:
    """One rank's samples at the features that another needs, series after series, as bytes."""
    pieces = [torch.empty(0, dtype=torch.uint8)]
    for need in needs:
        window = held[need.kind, need.site]
        if window is not None:
            pieces.append(window.features(slice(*need.features)).contiguous().view(torch.uint8).reshape(-1))
    return torch.cat(pieces)


def needs_of(layer: AttentionLayer, sites: Sequence[Site], owned: Owned, sharing: Mapping[Site, Site]) -> list[Need]:
    """What a rank needs of a layer: for each series, the features between the first and the last that it owns."""
    outputs: dict[Site, Features] = {}
    inputs: dict[Site, Features] = {}
    for projection in layer.projections:
        site = Site(layer.index, projection.module)
        if site not in sites:
            continue
        weight, bias = owned(projection, False), _bias(projection, owned)
        if rows := [(rect.row, rect.row_end) for rect in (*weight, *bias)]:
            outputs[site] = _hull(rows)
        if cols := [(rect.col, rect.col_end) for rect in weight]:
            shared = sharing[site]
            inputs[shared] = _hull([*cols, *([inputs[shared]] if shared in inputs else [])])
        elif bias:
            inputs.setdefault(sharing[site], (0, 0))
    return [Need("x", site, part) for site, part in sorted(inputs.items())] + [
        Need("d", site, part) for site, part in sorted(outputs.items())
    ]


def _bias(projection: Projection, owned: Owned) -> tuple[Rect, ...]:
    return owned(projection, True) if projection.has_bias else ()


def _hull(intervals: Sequence[Features]) -> Features:
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def _joined(spans_by_peer: Sequence[Sequence[Sequence[int]]], rows: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Spans in the rows of all peers, one peer after another."""
    joined, first = {}, 0
    for spans, num_rows in zip(spans_by_peer, rows, strict=True):
        for number, start, stop in spans:
            joined[number] = (first + start, first + stop)
        first += num_rows
    return joined


def _site(raw: Sequence[object]) -> Site:
    layer, module = raw
    return Site(int(str(layer)), str(module))
