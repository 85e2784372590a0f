"""What owners of weights are sent of other ranks' factors, in bytes, and the least that they could be sent.

    sent     X and D between the first and the last feature at which an owner scores an element, of all samples that
             others ran; of those that are kept as gradients, the rectangle between these features
    at least X and D at the features themselves; of gradients, the elements that it scores

Neither can be formed from anything else that the owner has, so that no schedule sends less, given who owns what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qkov_dist.capture.forms import GRADIENT_BYTES
from qkov_dist.distributed.topology import Topology
from qkov_dist.scoring.schedule import Round

from .rank_work import LayerWork, Needs
from .scoring_cost import ScoringCost
from .workload import KeptSamples

Kept = Mapping[int, KeptSamples]


@dataclass(frozen=True)
class Sent:
    """Bytes of factors in one or more rounds.

    Attributes:
        to_others: Sent to other ranks.
        at_least: What these cannot do without.
        largest_round: Held while the largest round comes in.
    """

    to_others: int = 0
    at_least: int = 0
    largest_round: int = 0


@dataclass(frozen=True, eq=False)
class ExchangeCost:
    """Counts for one way to divide the scores."""

    scoring: ScoringCost

    def sent(self, topology: Topology, rounds: Sequence[Round]) -> Sent:
        """What a rank sends of its samples to the owners of each round's layers, and what comes here."""
        if topology.dp_group.size == 1:
            return Sent()
        rank, before = topology.world.rank, None
        lengths = self.scoring.dealt.lengths[topology.dp_group.rank]
        kept = {above: KeptSamples.of(lengths, above) for above in self._thresholds}
        known: dict[tuple[int, ...], Sent] = {}  # most rounds are alike
        found = []
        for turn, all_ranks in zip(rounds, self._of_all(topology.dp_ranks, rounds), strict=True):
            layer = turn[rank]
            mine = None if layer is None else self.scoring.by_rank[rank][layer]
            key = id(all_ranks), id(mine), id(before)
            if key not in known:
                known[key] = self._in_round(all_ranks, mine, before, kept)
            found.append(known[key])
            before = mine
        return Sent(
            sum(one.to_others for one in found),
            sum(one.at_least for one in found),
            max((one.largest_round for one in found), default=0),
        )

    def _in_round(
        self, all_ranks: tuple[Needs, Needs], mine: LayerWork | None, before: LayerWork | None, kept: Kept
    ) -> Sent:
        """What a rank sends of the samples ``kept``, and holds while what it needs of all comes in."""
        every = {above: self.scoring.work.kept(above) for above in self._thresholds}
        needs, least = (mine.needs, mine.least) if mine else ((), ())
        sent = self._bytes(all_ranks[0], kept) - self._bytes(needs, kept)
        at_least = self._bytes(all_ranks[1], kept) - self._bytes(least, kept)
        in_work = self._bytes(before.last, every) if before else 0
        return Sent(sent, at_least, sent + self._bytes(needs, every) + in_work)

    @cached_property
    def _thresholds(self) -> frozenset[int]:
        return frozenset(site.above for layer_work in self.scoring.by_rank[0].values() for site in layer_work.sites)

    def _of_all(self, ranks: tuple[int, ...], rounds: Sequence[Round]) -> list[tuple[Needs, Needs]]:
        """What the ranks of a data-parallel group need together in each round, and what at least."""
        key = ranks[0], id(rounds)  # which stays as it is while the rounds are kept beside it
        if key not in self._known:
            alike: dict[tuple[int, ...], tuple[Needs, Needs]] = {}
            found = []
            for turn in rounds:
                layers = ((rank, turn[rank]) for rank in ranks)
                works = [self.scoring.by_rank[rank][layer] for rank, layer in layers if layer is not None]
                if (same := tuple(map(id, works))) not in alike:
                    alike[same] = _together(works)
                found.append(alike[same])
            self._known[key] = rounds, found
        return self._known[key][1]

    @cached_property
    def _known(self) -> dict[tuple[int, int], tuple[Sequence[Round], list[tuple[Needs, Needs]]]]:
        return {}

    def _bytes(self, needs: Needs, kept: Kept) -> int:
        """Bytes of what is needed of some samples."""
        size = self.scoring.work.scoring.factor_itemsize
        return sum(
            size * per_token * kept[above].tokens + GRADIENT_BYTES * whole * kept[above].wholes
            for above, per_token, whole in needs
        )


def _together(works: Sequence[LayerWork]) -> tuple[Needs, Needs]:
    """What several need together, and what at least."""
    times = Counter(map(id, works))
    each = [(work, times[n]) for n, work in {id(work): work for work in works}.items()]
    return _sum((work.needs, num) for work, num in each), _sum((work.least, num) for work, num in each)


def _sum(needs: Iterable[tuple[Needs, int]]) -> Needs:
    """The sum of needs, each so many times."""
    tokens, wholes = Counter[int](), Counter[int]()
    for of_one, num in needs:
        for above, per_token, whole in of_one:
            tokens[above] += num * per_token
            wholes[above] += num * whole
    return tuple((above, tokens[above], wholes[above]) for above in sorted(tokens))
