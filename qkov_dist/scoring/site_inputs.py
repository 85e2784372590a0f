"""One projection's factors of all samples, as the workers are handed them: padded, in the type of scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, SampleIndex, Whole
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site
from qkov_dist.memory import is_shortage

from .influence_records import num_sums
from .influence_sums import MeanWeights
from .kernel import Padded
from .padded_groups import Ordering, order_samples
from .settings import Roles, ScoreSettings
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
class SiteFactors:
    """One projection's factors of all members, in an order of its own."""

    ordering: Ordering
    padded: Sequence[Padded]
    roles: Roles

    @cached_property
    def weights(self) -> Tensor:
        """Each member's weight in the Fisher, by task, in this order: float64 [T, N]."""
        return torch.from_numpy(self.roles.weights[:, list(self.ordering.order)])

    @cached_property
    def means(self) -> MeanWeights | None:
        """How means over tasks are taken, of members in this order, float64; None where effects are left out."""
        means, roles = self.roles.means, self.roles
        if means is None:
            return None
        return MeanWeights.of(torch.from_numpy(means[list(self._scored)]), roles.sizes, self.weights)

    def records_in_order_of_roles(self, records: Tensor) -> Tensor:
        """Records [heads, optimizer, sums and influences] in this order, as those in the order of the roles."""
        places, sums = torch.tensor(self.ordering.place[: self.roles.num_scored]), num_sums(len(self.roles.sizes))
        influences = records[..., sums:].reshape(*records.shape[:-1], -1, self.roles.num_scored)[..., places]
        return torch.cat([records[..., :sums], influences.flatten(-2)], dim=-1)

    @property
    def _scored(self) -> Sequence[int]:
        """Positions of the members with a role, which come first in this order too."""
        return self.ordering.order[: self.roles.num_scored]

    def in_order_of_roles(self, scores: Tensor) -> Tensor:
        """Scores [heads, left, right] of pairs of members in this order, as pairs in the order of the roles."""
        left, right = self._places
        return scores[:, left, right]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where the members in the role of i are, as a column, and those in the role of j."""
        parts = (self.roles.left, self.roles.right)
        left, right = (torch.tensor(self.ordering.place[part]) - part.start for part in parts)
        return left.unsqueeze(1), right


def _scaled(
    ordering: Ordering, outputs: Sequence[FeatureSlice], kept: Sequence[Whole | None], scales: Tensor
) -> tuple[list[FeatureSlice], list[Whole | None]]:
    """D of each group, or its gradients, times what its samples are multiplied by: [members]."""
    in_order = scales[list(ordering.order)].view(-1, 1, 1)
    of_groups = [in_order[group.first : group.last] for group in ordering.groups]
    return (
        [FeatureSlice(d.values * scale.to(d.values), d.start) for d, scale in zip(outputs, of_groups, strict=True)],
        [
            whole and Whole(whole.values * scale.to(whole.values), whole.row, whole.col)
            for whole, scale in zip(kept, of_groups, strict=True)
        ],
    )


def read_sites(
    tiles: Sequence[Tile], source: FactorSource, roles: Roles, settings: ScoreSettings
) -> Iterator[tuple[Site, SiteFactors]]:
    """Each projection with its factors, group by group, in :func:`~qkov_dist.scoring.tiles.in_order_of_work`.

    X is read once for those that share it.

    Raises:
        QkovError: where a projection's factors do not fit into a GPU's memory beside what is there.
    """
    try:
        yield from _read_sites(tiles, source, roles, settings)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise QkovError(
            f"layer {tiles[0].site.layer}",
            expected=f"memory on {settings.device} for the factors of all samples at two projections",
            got="too little",
            remedy="Use fewer or shorter samples, or more ranks; in Python, score with the metric's device='cpu'.",
        ) from error


def _read_sites(
    tiles: Sequence[Tile], source: FactorSource, roles: Roles, settings: ScoreSettings
) -> Iterator[tuple[Site, SiteFactors]]:
    cuts = (roles.left.start, roles.left.stop, roles.right.start, roles.right.stop, *accumulate(roles.sizes))
    x_site, inputs, work = None, [], Counter[Site]()
    for tile in tiles:
        work[tile.site] += tile.rect.area
    for site in in_order_of_work({site: (source.x_site(site), area) for site, area in work.items()}):
        ordering = order_samples(roles.members, source.sample_index(site), cuts)
        if x_site != source.x_site(site):
            x_site, x = source.x_site(site), source.x(site).to(settings.device, settings.dtype)
            inputs = [FeatureSlice(group.inputs(x.values), x.start) for group in ordering.groups]
        d, whole = source.d(site).to(settings.device, settings.dtype), source.g(site)
        whole = whole and whole.to(settings.device, settings.dtype)
        outputs = [FeatureSlice(group.outputs(d.values), d.start) for group in ordering.groups]
        kept = [whole and group.wholes(whole) for group in ordering.groups]
        if roles.scales is not None:
            outputs, kept = _scaled(ordering, outputs, kept, torch.from_numpy(roles.scales))
        groups = zip(ordering.groups, inputs, outputs, kept, strict=True)
        yield site, SiteFactors(ordering, [Padded(*group) for group in groups], roles)
