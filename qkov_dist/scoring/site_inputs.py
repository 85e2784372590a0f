"""One projection's factors of all samples, as the workers are handed them: padded, in the type of scores.

On a GPU, projections that read one X (Q, K and V, where they are modules of their own) are handed on as one, where one
batch holds all their heads: D side by side, so that one product forms the gradients of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Protocol

import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, SampleIndex, Whole
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.layout.rects import Rect
from qkov_dist.memory import is_shortage, moved

from .head_batches import head_batches
from .influence_records import num_sums
from .influence_sums import MeanWeights
from .native_kernel import NativeKernel
from .own_shares import Shares
from .packed_factors import Blocks, LaneWeights, PackedFactor, PackedSite
from .padded_groups import Ordering, order_samples
from .settings import Roles, ScoreSettings
from .tile_gradients import Padded, product_dtype
from .tiles import Tile, in_order_of_work


class FactorSource(Protocol):
    """Where a layer's factors come from: this process's own store, or the ranks that ran the samples."""

    def sample_index(self, site: Site) -> SampleIndex:
        """Where each sample is at a site."""

    def x_site(self, site: Site) -> Site:
        """The site whose X this site shares."""

    def x(self, site: Site) -> FeatureSlice:
        """Inputs of all factored samples' tokens."""

    def d(self, site: Site) -> FeatureSlice:
        """Output gradients of all factored samples' tokens."""

    def g(self, site: Site) -> Whole | None:
        """Gradients of the samples that are kept as such."""


@dataclass(frozen=True)
class Members:
    """All members in an order of their own, and what is known of them, where heads are scored.

    Attributes:
        ordering: The order.
        roles: Who they are.
        device: Where heads are scored.
        dtype: In which type.
        kernel: What scores them, if not torch's products.
    """

    ordering: Ordering
    roles: Roles
    device: torch.device | str
    dtype: torch.dtype
    kernel: NativeKernel | None = None

    @cached_property
    def blocks(self) -> Blocks | None:
        """How members lie in the kernel's lanes; None where it does not score them."""
        return None if self.kernel is None else Blocks.of(self.kernel, self.ordering.groups)

    @cached_property
    def in_lanes(self) -> LaneWeights | None:
        """What members count for, where there are blocks."""
        if self.blocks is None:
            return None
        return LaneWeights.of(self.blocks, self.weights, self.means, self.shares, self._scales)

    @cached_property
    def weights(self) -> Tensor:
        """Each member's weight in the Fisher, by task, in this order: [T, N]."""
        return moved(self._weights, self.device, self.dtype)

    @cached_property
    def means(self) -> MeanWeights | None:
        """How means over tasks are taken, of members in this order; None where effects are left out."""
        means, roles = self.roles.means, self.roles
        if means is None:
            return None
        scored = torch.from_numpy(means[list(self.ordering.order[: roles.num_scored])])
        return MeanWeights.of(scored, roles.sizes, self._weights).to(self.device, self.dtype)

    @cached_property
    def shares(self) -> Shares | None:
        """Their shares of the Fisher, in this order; None where nobody asks what these do."""
        if not self.roles.own_shares:
            return None
        return Shares.of(self._weights, self.roles.sizes).to(self.device, self.dtype)

    @cached_property
    def scales(self) -> list[Tensor | None]:
        """What gradients of each group's samples are multiplied by, [n, 1, 1]; None where they are left alone."""
        groups, scales = self.ordering.groups, self._scales
        return [None if scales is None else scales[group.first : group.last].view(-1, 1, 1) for group in groups]

    def records_in_order_of_roles(self, records: Tensor) -> Tensor:
        """Records [heads, optimizer, sums and influences] in this order, as those in the order of the roles."""
        sums = num_sums(len(self.roles.sizes))
        influences = records[..., sums:].reshape(*records.shape[:-1], -1, self.roles.num_scored)
        return torch.cat([records[..., :sums], influences[..., self._scored].flatten(-2)], dim=-1)

    def shares_in_order_of_roles(self, records: Tensor) -> Tensor:
        """Records of own shares [heads, ... of N] in this order, as those in the order of the roles."""
        return records.view(len(records), -1, self.roles.num_scored)[..., self._scored].flatten(1)

    def in_order_of_roles(self, scores: Tensor) -> Tensor:
        """Scores [heads, left, right] of pairs of members in this order, as pairs in the order of the roles."""
        left, right = self._places
        return scores[:, left, right]

    @cached_property
    def _scales(self) -> Tensor | None:
        """What each member's gradient is multiplied by, [N]."""
        if self.roles.scales is None:
            return None
        return moved(torch.from_numpy(self.roles.scales[list(self.ordering.order)]), self.device, self.dtype)

    @property
    def _weights(self) -> Tensor:
        return torch.from_numpy(self.roles.weights[:, list(self.ordering.order)])

    @cached_property
    def _scored(self) -> Tensor:
        """Where the members with a role are, which come first in this order too."""
        return moved(torch.tensor(self.ordering.place[: self.roles.num_scored]), self.device)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where the members in the role of i are, as a column, and those in the role of j."""
        parts = (self.roles.left, self.roles.right)
        left, right = (moved(torch.tensor(self.ordering.place[part]) - part.start, self.device) for part in parts)
        return left.unsqueeze(1), right


class MemberOrders:
    """The order of members at each site: one for all sites, of all layers, at which samples lie alike.

    Args:
        roles: The members.
        settings: Where heads are scored, and in which type.
    """

    def __init__(self, roles: Roles, settings: ScoreSettings) -> None:
        self.roles, self.settings = roles, settings
        self._known: dict[int, tuple[SampleIndex, Members]] = {}

    def of(self, sample_index: SampleIndex) -> Members:
        """The order of members where samples lie so; an index is not changed once it is known."""
        if id(sample_index) not in self._known:
            roles, settings = self.roles, self.settings
            cuts = (roles.left.start, roles.left.stop, roles.right.start, roles.right.stop, *accumulate(roles.sizes))
            ordering = order_samples(roles.members, sample_index, cuts).to(settings.device)
            members = Members(ordering, roles, settings.device, settings.dtype, settings.kernel)
            self._known[id(sample_index)] = sample_index, members
        return self._known[id(sample_index)][1]


@dataclass(frozen=True)
class SiteFactors:
    """The factors of all members at one projection, or at several that are worked on together, in an order of its own.

    Attributes:
        members: The order, and what is known of them.
        padded: Factors, group by group; nothing where the kernel scores all of it.
        packed: The same as the compiled kernel reads them; None where it scores nothing.
        by_kernel: The blocks whose weights it scores; none where samples do not fill its lanes.
        rows: Of several projections, how far down the rows of each lie among those of all.
    """

    members: Members
    padded: Sequence[Padded]
    packed: PackedSite | None = None
    by_kernel: frozenset[str] = frozenset()
    rows: Mapping[Site, int] = field(default_factory=dict)

    def place(self, tile: Tile) -> Rect:
        """Where a tile lies among the rows of all projections."""
        rect, down = tile.rect, self.rows.get(tile.site, 0)
        return Rect(rect.row + down, rect.row_end + down, rect.col, rect.col_end)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All that torch's products make gradients of."""
        return (tensor for padded in self.padded for tensor in padded.tensors)

    def are_packed_for(self, tile: Tile) -> bool:
        """Whether the kernel scores a tile of this projection."""
        return _is_weight_of(tile, self.by_kernel)


def _is_weight_of(tile: Tile, blocks: frozenset[str]) -> bool:
    return tile.block in blocks and not tile.bias


def read_sites(
    tiles: Sequence[Tile], source: FactorSource, orders: MemberOrders, by_kernel: frozenset[str] = frozenset()
) -> Iterator[tuple[Sequence[Site], SiteFactors]]:
    """Projections with their factors in :func:`~qkov_dist.scoring.tiles.in_order_of_work`, one by one or some as one.

    X is read once for those that share it.

    Args:
        tiles: What is scored of a layer.
        source: Its factors.
        orders: The order of members at each projection.
        by_kernel: The blocks whose weights the compiled kernel scores, where samples fill its lanes.

    Raises:
        QkovError: where a projection's factors do not fit into a GPU's memory beside what is there.
    """
    if tiles:
        with room_for_factors(tiles[0].site.layer, orders.settings.device):
            yield from _read_sites(tiles, source, orders, by_kernel)


@contextmanager
def room_for_factors(layer: int, device: torch.device | str) -> Iterator[None]:
    """Raises:
    QkovError: where factors that are brought to a device do not fit into its memory beside what is there.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise QkovError(
            f"layer {layer}",
            expected=f"memory on {device} for the factors of all samples at two projections",
            got="too little",
            remedy="Use fewer or shorter samples, or more ranks; in Python, score with the metric's device='cpu'.",
        ) from error


@dataclass(frozen=True)
class _Inputs:
    """X of all rows [tokens, in], as the projections that share it need it."""

    x: FeatureSlice
    members: Members

    @cached_property
    def padded(self) -> list[FeatureSlice]:
        """X of each group."""
        return [FeatureSlice(group.inputs(self.x.values), self.x.start) for group in self.members.ordering.groups]

    @cached_property
    def packed(self) -> PackedFactor | None:
        """X as the kernel reads it; None where samples do not fill its lanes."""
        return None if self.members.blocks is None else self.members.blocks.pack(self.x.values)


def _read_sites(
    tiles: Sequence[Tile], source: FactorSource, orders: MemberOrders, by_kernel: frozenset[str]
) -> Iterator[tuple[Sequence[Site], SiteFactors]]:
    work = Counter[Site]()
    for tile in tiles:
        work[tile.site] += tile.rect.area
    order = in_order_of_work({site: (source.x_site(site), area) for site, area in work.items()})
    for _, reading in groupby(order, key=source.x_site):
        sites = [*reading]
        members = orders.of(source.sample_index(sites[0]))
        inputs = _Inputs(_to_be_multiplied(source.x(sites[0]), orders.settings), members)
        of_sites = [tile for tile in tiles if tile.site in sites]
        if _are_one(of_sites, source, orders):
            yield sites, _side_by_side(of_sites, inputs, source, orders.settings)
            continue
        for site in sites:
            of_site = [tile for tile in of_sites if tile.site == site]
            yield [site], _of_one(site, of_site, inputs, source, orders.settings, by_kernel)


def _are_one(tiles: Sequence[Tile], source: FactorSource, orders: MemberOrders) -> bool:
    """Whether projections that read one X are worked on as one: where a batch holds all heads of several."""
    sites, num = {tile.site for tile in tiles}, len(orders.roles.members)
    if len(sites) == 1 or any(source.sample_index(site).whole for site in sites):
        return False
    weights = [tile for tile in tiles if not tile.bias]
    alike = len({source.d(site).values.dtype for site in sites}) == 1
    return alike and len(head_batches(weights, orders.settings.max_elements(num), num)) == 1


def _side_by_side(tiles: Sequence[Tile], inputs: _Inputs, source: FactorSource, settings: ScoreSettings) -> SiteFactors:
    """Factors of projections that read one X, D of one beside that of another in the order of the tiles."""
    members, rows, start = inputs.members, dict[Site, int](), 0
    outputs = {site: _to_be_multiplied(source.d(site), settings) for site in dict.fromkeys(t.site for t in tiles)}
    for site, d in outputs.items():
        rows[site] = start - d.start
        start += d.values.shape[1]
    padded = []
    for group, x, scale in zip(members.ordering.groups, inputs.padded, members.scales, strict=True):
        d = FeatureSlice(torch.cat([group.outputs(of.values) for of in outputs.values()], -1))
        padded.append(_scaled(Padded(group, x, d, scale=scale), settings.dtype))
    return SiteFactors(members, padded, rows=rows)


def _of_one(
    site: Site,
    tiles: Sequence[Tile],
    inputs: _Inputs,
    source: FactorSource,
    settings: ScoreSettings,
    by_kernel: frozenset[str],
) -> SiteFactors:
    """Factors of one projection: packed, padded, or both, as its tiles are scored."""
    members, d = inputs.members, _to_be_multiplied(source.d(site), settings)
    wanted = any(_is_weight_of(tile, by_kernel) for tile in tiles)
    packed = _packed(members, inputs, d) if wanted else None
    factors = SiteFactors(members, (), packed, frozenset() if packed is None else by_kernel)
    if all(map(factors.are_packed_for, tiles)):
        return factors
    return replace(factors, padded=_padded(members, inputs, d, source.g(site), settings))


def _packed(members: Members, inputs: _Inputs, d: FeatureSlice) -> PackedSite | None:
    """Factors as the kernel reads them; None where samples do not fill its lanes."""
    blocks, weights, x = members.blocks, members.in_lanes, inputs.packed
    if blocks is None or weights is None or x is None:
        return None
    return PackedSite(blocks, x, blocks.pack(d.values, weights.scales), inputs.x.start, d.start, weights)


def _padded(
    members: Members, inputs: _Inputs, d: FeatureSlice, whole: Whole | None, settings: ScoreSettings
) -> list[Padded]:
    """Factors, and gradients that are kept, group by group."""
    groups = members.ordering.groups
    whole = whole and whole.to(settings.device, settings.dtype)
    outputs = [FeatureSlice(group.outputs(d.values), d.start) for group in groups]
    kept = [whole and group.wholes(whole) for group in groups]
    each = zip(groups, inputs.padded, outputs, kept, members.scales, strict=True)
    return [_scaled(Padded(*group), settings.dtype) for group in each]


def _to_be_multiplied(factor: FeatureSlice, settings: ScoreSettings) -> FeatureSlice:
    return factor.to(settings.device, product_dtype(factor.values.dtype, settings.dtype, settings.device))


def _scaled(padded: Padded, dtype: torch.dtype) -> Padded:
    """D, or gradients that are kept, times what samples are multiplied by; not D in a type that would round it."""
    if padded.scale is None or (padded.whole is None and padded.d.values.dtype != dtype):
        return padded
    whole = padded.whole and Whole(padded.whole.values * padded.scale, padded.whole.row, padded.whole.col)
    return replace(padded, d=FeatureSlice(padded.d.values * padded.scale, padded.d.start), whole=whole, scale=None)
