"""What a worker does with a batch of heads: from factors, tile by tile, to scores, sums of I, effects and own shares.

It is done by torch's products, by the compiled kernel of a CPU, or by that of a GPU. What leaves is on its way to the
host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from qkov_dist.layout.heads import BLOCKS
from qkov_dist.layout.rects import Rect, merged

from .fisher_sums import FisherSums
from .head_batches import HeadBatch
from .influence_records import Influences, no_influences
from .influence_sums import InfluenceSums
from .kernel import Rule, add_tile, pair_products, tile_flops
from .own_share_records import Records as ShareRecords
from .own_share_records import no_shares
from .own_shares import Chosen, OwnShares, chosen
from .pipeline import Found
from .score import Fused, added_fisher_sums, fisher_sums
from .settings import Roles, ScoreSettings
from .site_inputs import Members, SiteFactors
from .streams import OnItsWay
from .tile_gradients import Buffers, joined, tile_gradients
from .tiles import Tile


@dataclass(frozen=True)
class HeadPart:
    """What the tiles of one head in one projection contribute; scores in the order of the roles."""

    scores: Tensor
    fisher: FisherSums
    influences: Influences
    own_shares: ShareRecords
    flops: int
    formed: Tensor | None  # the same scores where they were formed, of a layer whose scores stay there


@dataclass(frozen=True)
class HeadScorer:
    """What a worker does with a batch of heads.

    Attributes:
        roles: The samples.
        settings: The metric.
        ridges: Lambda by layer and block; that of a layer is there before its heads are.
        strides: Likewise, which elements are looked at for own shares.
        fused: The elementwise part, compiled; None maps in place.
    """

    roles: Roles
    settings: ScoreSettings
    ridges: Mapping[tuple[int, str], float]
    strides: Mapping[tuple[int, str], int]
    fused: Fused | None

    def __call__(self, batch: HeadBatch, site: SiteFactors, buffers: Buffers) -> Found[HeadPart]:
        """Scores of all pairs, and what is known of I, of each head; of its tiles in this projection."""
        settings, roles, tile, members = self.settings, self.roles, batch.first, site.members
        rule = self.rule(tile.site.layer, [one.block for one in batch.first_tiles])
        scores = torch.zeros((len(batch.heads), *roles.shape), dtype=settings.dtype, device=settings.device)
        effects, own = self._effects(batch, members), self._own_shares(batch, members, rule)
        if batch.by_kernel and site.packed is not None:
            rects = [merged(one.rect for one in of_head) for of_head in batch.heads]
            of_own = None if own is None else (own, lambda rect: self._elements([tile], [rect]))
            fisher = site.packed.add_heads(scores, rects, rule, buffers, effects, of_own)
        else:
            fisher = reduce(added_fisher_sums, self._records(batch, site, buffers, rule, scores, effects, own))
        found = [members.in_order_of_roles(scores), fisher]
        if effects is not None:
            found.append(members.records_in_order_of_roles(effects.records()))
        if own is not None:
            found.append(members.shares_in_order_of_roles(own.records()))
        in_half = batch.by_kernel or rule.in_cache(len(batch.heads), scores.device)
        pairs = pair_products(*roles.shape, in_half=in_half and rule.is_symmetric)
        flops = [
            sum(
                tile_flops(members.ordering.groups, tile.rect.area, pairs, bias=tile.bias, effects=effects)
                for tile in of_head
            )
            for of_head in batch.heads
        ]
        formed = found[0] if tile.site.layer in settings.kept_layers and tile.block in BLOCKS else None
        return partial(_parts, OnItsWay.of(*found), flops, formed, with_effects=effects is not None)

    def rule(self, layer: int, blocks: Sequence[str]) -> Rule:
        """The score of some heads of a layer, by the block of each."""
        settings, roles = self.settings, self.roles
        ridges = tuple(self.ridges[layer, block] for block in blocks)
        return Rule(settings.score, settings.epsilon, ridges, roles.left, roles.right, self.fused)

    def _fastest(self, rule: Rule, band: Sequence[Tile], members: Members, buffers: Buffers) -> Rule:
        """The rule with what scores tiles of one shape fastest."""
        if (trials := self.settings.trials) is None or band[0].bias:
            return rule
        return trials.fastest(rule, len(band), band[0].rect.area, members.weights, buffers)

    def _records(
        self,
        batch: HeadBatch,
        site: SiteFactors,
        buffers: Buffers,
        rule: Rule,
        scores: Tensor,
        effects: InfluenceSums | None,
        own: OwnShares | None,
    ) -> Iterator[Tensor]:
        """Add a tile of each head at a time by torch's products; yields what is known of I there."""
        for band in batch.bands:
            by = self._fastest(rule, band, site.members, buffers)
            gradients, of_own = _gradients(band, site, buffers), self._with_elements(own, band, site)
            by_task = add_tile(scores, gradients, site.members.weights, by, buffers, effects, of_own)
            yield fisher_sums(by_task, rule.least)

    def _effects(self, batch: HeadBatch, members: Members) -> InfluenceSums | None:
        """Where influences of a batch are added up; None of what belongs to no head, and where they are left out."""
        if members.means is None or batch.first.block not in BLOCKS:
            return None
        return InfluenceSums(members.means, len(batch.heads))

    def _own_shares(self, batch: HeadBatch, members: Members, rule: Rule) -> OwnShares | None:
        """The same of what samples' own shares of the Fisher do."""
        if members.shares is None or batch.first.block not in BLOCKS:
            return None
        return OwnShares(members.shares, len(batch.heads), rule.score, rule.epsilon, rule.ridges)

    def _with_elements(
        self, own: OwnShares | None, band: Sequence[Tile], site: SiteFactors
    ) -> tuple[OwnShares, Chosen] | None:
        """With the elements looked at of the tiles of some heads; None where there are none."""
        if own is None:
            return None
        turned = joined([site.place(one) for one in band])[1]
        elements = self._elements(band, [one.rect for one in band], turned=turned)
        return None if elements is None else (own, elements)

    def _elements(self, tiles: Sequence[Tile], rects: Sequence[Rect], *, turned: bool = False) -> Chosen | None:
        """The elements looked at of rectangles, one in the block of each tile; None where there are none."""
        strides = [self.strides[tile.site.layer, tile.block] for tile in tiles]
        return chosen(rects, strides, self.settings.device, turned=turned)


def _gradients(band: Sequence[Tile], site: SiteFactors, buffers: Buffers) -> Tensor:
    dtype, rects = site.members.dtype, [site.place(tile) for tile in band]
    return tile_gradients(site.padded, rects, bias=band[0].bias, dtype=dtype, buffers=buffers)


def _parts(found: OnItsWay, flops: Sequence[int], formed: Tensor | None, *, with_effects: bool) -> list[HeadPart]:
    """What the heads of a batch contribute, once it is there."""
    scores, fisher, *others = found.there()
    influences = others.pop(0).numpy() if with_effects else no_influences(len(scores))
    shares = others.pop().numpy() if others else no_shares(len(scores))
    kept = [None] * len(scores) if formed is None else formed
    of_heads = zip(scores, fisher.numpy(), influences, shares, flops, kept, strict=True)
    return [HeadPart(*of_head) for of_head in of_heads]
