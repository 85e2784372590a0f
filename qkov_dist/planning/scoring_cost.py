"""What it costs a rank to score what it owns: factors waiting, tiles, scores, files.

Counted is what the run itself counts or holds, from the same integers.

    scoring   2 P (T + K N + n_i n_j + E) operations for P elements, T padded tokens, N samples: gradients, K tasks'
              Fisher, all pairs, effects (as :func:`~qkov_dist.scoring.kernel.tile_flops` counts)
    factors   of one layer, what ``capture.factors.factor_bytes`` counts
    buffers   for each worker a tile's gradients and the squares in work; padded or packed factors of two projections,
              one in work and one on its way, which may be the next layer's first; of what came from other ranks, too
    written   each head of which the rank owns an element, all pairs; on rank 0 also the heatmap
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from math import prod

from qkov_dist.capture.forms import factor_bytes
from qkov_dist.distributed.plans import SHARDED_BY_HOOKS
from qkov_dist.distributed.topology import Topology
from qkov_dist.layout.heads import BLOCKS, Projection, Site
from qkov_dist.layout.rects import Rect
from qkov_dist.results.metadata import LayerAxes
from qkov_dist.results.reduce import deal_heads
from qkov_dist.scoring.fisher_sums import num_columns
from qkov_dist.scoring.gram_norms import norm_flops
from qkov_dist.scoring.head_batches import heads_at_a_time
from qkov_dist.scoring.influence_records import OPTIMIZERS, no_influences
from qkov_dist.scoring.influence_sums import effect_products
from qkov_dist.scoring.kernel import BLOCK_PAIRS, CHUNK_BYTES, PRODUCTS, pair_products
from qkov_dist.scoring.own_share_records import KNOWN, formed_with, no_shares
from qkov_dist.scoring.packed_factors import LEAST_FILLED
from qkov_dist.scoring.score_kinds import KINDS
from qkov_dist.scoring.settings import may_stay
from qkov_dist.scoring.tiles import GPU_TILE_BYTES

from .rank_work import LayerWork, SiteWork
from .workload import Dealt, Workload

TABLE_BYTES = 8 * (4 + 2 * 18 + 2 * 11)  # of a head in heatmap.h5 besides its scores: means, Fisher, tests, effects
RECORD_BYTES = 250  # of a head's record, where it is significant
MATRIX_BYTES = 24  # of each head's scores in heatmap.h5: checksum and index
DATASET_BYTES, FILE_BYTES = 350, 16 * 2**10  # what HDF5 and names add in a partial file, to a dataset and in all
TABLES_BYTES = 140 * 2**10  # the same of the 278 small datasets and the attributes of heatmap.h5


Heads = Mapping[str, tuple[int, ...]]  # by block


@dataclass(frozen=True, eq=False)
class ScoringCost:
    """Counts for one way to divide the scores; ranks differ in what they own and in the samples they run.

    Attributes:
        work: What is scored.
        dealt: Who runs which samples.
        by_rank: What every rank has of every layer.
        left: The layers that are still to be scored, of a run that goes on; None: all.
    """

    work: Workload
    dealt: Dealt
    by_rank: Sequence[Mapping[int, LayerWork]]
    left: frozenset[int] | None = None

    @cached_property
    def matrix(self) -> int:
        """Bytes of one head's scores."""
        return self.work.pairs[0] * self.work.pairs[1] * self.work.scoring.itemsize

    @cached_property
    def a_head(self) -> int:
        """Bytes of what a rank has of one head: scores, what is known of I, effects, what own shares of I do."""
        num, num_tasks = sum(self.work.num_samples), len(self.work.tasks)
        sums = num_columns(num_tasks) + no_influences(1, num, num_tasks).size
        return self.matrix + 8 * sums + self.own_shares

    @cached_property
    def own_shares(self) -> int:
        """Bytes of a head's sums for what samples' own shares of the Fisher do to overlap; 0 where none are formed."""
        if not formed_with(self.work.config.metric.score, pooled=self.work.config.pooled):
            return 0
        return 8 * no_shares(1, sum(self.work.num_samples), len(self.work.tasks)).size

    @cached_property
    def cells(self) -> dict[str, int]:
        """By block, layers times heads of the heatmap: its axis of heads is the longest of any layer."""
        layer_works = self.by_rank[0].values()
        axes = {block: max((len(s.every_head.get(block, ())) for s in layer_works), default=0) for block in BLOCKS}
        return {block: len(layer_works) * width for block, width in axes.items()}

    def factors(self, topology: Topology) -> dict[int, int]:
        """By layer, bytes of the factors of the samples that a rank runs."""
        lengths, size = self.dealt.lengths[topology.dp_group.rank], self.work.scoring.factor_itemsize
        known: dict[int, int] = {}  # layers of one kind are alike
        for layer, layer_work in self.by_rank[0].items():
            if id(layer_work) not in known:
                sites, seen = self._captured(layer), self._seen(topology, layer)
                known[id(layer_work)] = factor_bytes(self.work.layout.layer(layer), sites, lengths, size, seen)
        return {layer: known[id(layer_work)] for layer, layer_work in self.by_rank[0].items()}

    def flops_kept(self, topology: Topology, layers: Sequence[int]) -> int:
        """Operations of the gradients that a rank forms while it captures."""
        lengths = self.dealt.lengths[topology.dp_group.rank]
        return sum(
            times * 2 * prod(shape) * sum(length for length in lengths if length > above)
            for (shape, above, _), times in self._kinds_of_sites(topology, layers).items()
        )

    def flops_norms(self, topology: Topology, layers: Sequence[int], *, norms_known: bool = False) -> int:
        """Operations of norms of gradients of the samples that a rank runs: for the sums of I that a relative ridge
        needs, and once more for ``sample_scale``, where these are not known from before.
        """
        config = self.work.config
        times = (config.ridge.relative > 0) + (config.metric.sample_scale == "unit" and not norms_known)
        lengths, flops = self.dealt.lengths[topology.dp_group.rank], 0
        for (shape, above, readers), num in self._kinds_of_sites(topology, layers).items() if times else ():
            factored = (length for length in lengths if length <= above)
            flops += num * times * sum(norm_flops(length, *shape, readers) for length in factored)
        return flops

    def _kinds_of_sites(self, topology: Topology, layers: Sequence[int]) -> Counter[tuple[tuple[int, int], int, int]]:
        """Captured projections as a rank sees them: shape, threshold, readers of the same X; and how many there are."""
        key = tuple(layers), topology.dp_ranks[0]
        if key not in self._known_sites:
            found = self._known_sites[key] = Counter()
            for layer in layers:
                captured, seen = self._captured(layer), self._seen(topology, layer)
                readers = Counter(site_work.input for _, site_work in captured.values())
                for site, (projection, site_work) in captured.items():
                    shape = seen.get(site, projection.whole()).shape
                    found[shape, site_work.above, readers[site_work.input]] += 1
        return self._known_sites[key]

    @cached_property
    def _known_sites(self) -> dict[tuple[tuple[int, ...], int], Counter[tuple[tuple[int, int], int, int]]]:
        """By layers and the first of the data-parallel ranks, which see the same."""
        return {}

    def _seen(self, topology: Topology, layer: int) -> dict[Site, Rect]:
        """The tensor-parallel shards that hooks on a rank see of a layer; other styles gather features first."""
        styles, rects = self.work.model_sizes.styles, topology.tp_rects
        return {
            site: rects[site]
            for site in self._captured(layer)
            if site in rects and styles.get(site.module) in SHARDED_BY_HOOKS
        }

    def flops(self, rank: int, layers: Sequence[int]) -> int:
        """Operations of a rank's scores."""
        num, scoring = sum(self.work.num_samples), 0
        config = self.work.config
        in_half = config.pooled and KINDS[config.metric.score].is_symmetric and not self.work.on_gpu  # type: ignore[index]
        pairs = pair_products(*self.work.pairs, in_half=in_half)
        for layer_work, times in self._counted(rank, layers):
            for site in layer_work.sites:
                tokens = self.work.padded_tokens(site.above)
                elements = site.area + site.bias_area
                of_effects = effect_products(num, len(self.work.tasks))
                products = elements * (len(self.work.tasks) * num + pairs) + (elements - site.shared_area) * of_effects
                scoring += times * 2 * (site.area * tokens + products)
        return scoring

    def flops_narrow(self, rank: int, layers: Sequence[int]) -> int:
        """Those of them that are products of factors in half a type, added up in float32."""
        if self.work.scoring.product_itemsize == self.work.scoring.itemsize:
            return 0
        counted = ((site, times) for layer_work, times in self._counted(rank, layers) for site in layer_work.sites)
        return sum(2 * times * site.area * self.work.padded_tokens(site.above) for site, times in counted)

    def elements(self, rank: int, layers: Sequence[int]) -> int:
        """Elements of all gradients that a rank forms for its scores."""
        areas = (
            times * (site.area + site.bias_area)
            for layer_work, times in self._counted(rank, layers)
            for site in layer_work.sites
        )
        return self.work.scoring.num_samples * sum(areas)

    def buffers(self, rank: int, layers: Sequence[int]) -> int:
        """Bytes of tiles in work and of padded factors, at most."""
        layer_works = [(layer_work, times) for layer_work, times in self._counted(rank, layers) if layer_work.heads]
        compiled = self._compiles(rank)
        tiles = max((self._tiles(layer_work, compiled) for layer_work, _ in layer_works), default=0)
        return tiles + self._multiplied_factors(layer_works, packed=compiled and not self.work.on_gpu)

    def _compiles(self, rank: int) -> bool:
        """Whether a rank's scores are formed by what is compiled."""
        return self.work.compiles(self.elements(rank, list(self.by_rank[rank])))

    def scores(self, rank: int, layers: Sequence[int]) -> int:
        """Bytes of one layer's scores; a rank has room for all heads, whether or not it owns a part of them."""
        layer_works = (layer_work for layer_work, _ in self._counted(rank, layers) if layer_work.heads)
        return max((self.matrix * _num(layer_work.every_head) for layer_work in layer_works), default=0)

    def partials(self, rank: int) -> int:
        """Bytes of a rank's partial file."""
        layer_works = self._counted(rank, [*self.by_rank[rank]])
        datasets = (3 + bool(self.own_shares)) * sum(times * len(layer_work.heads) for layer_work, times in layer_works)
        scores = sum(times * _num(layer_work.heads) for layer_work, times in layer_works) * self.a_head
        return scores + datasets * DATASET_BYTES + FILE_BYTES

    def heatmap(self) -> int:
        """Bytes of heatmap.h5."""
        config, total = self.work.config, 0
        for num_a, num_b in self.work.sizes_of_pairs:
            matrices = {"none": (), "cross": (num_a * num_b,), "all": (num_a * num_b, (num_a + num_b) ** 2)}
            a_head = TABLE_BYTES + 8 * len(OPTIMIZERS) * (num_a + num_b)
            a_head += sum(size * self.work.scoring.itemsize + MATRIX_BYTES for size in matrices[config.output.pairs])
            a_head += RECORD_BYTES if config.statistics.enabled else 0
            a_head += 8 * len(KNOWN) * (num_a + num_b) if config.output.pairs == "all" and self.own_shares else 0
            total += sum(self.cells.values()) * a_head + TABLES_BYTES
        return total

    @cached_property
    def early(self) -> dict[int, int]:
        """By layer that is tested as it is scored, the rank that has it whole: on a GPU, if its scores stay there."""
        if not (self.work.on_gpu and self.work.config.statistics.enabled):
            return {}
        owners = {
            layer: [rank for rank, layer_works in enumerate(self.by_rank) if layer_works[layer].heads]
            for layer, layer_work in self.by_rank[0].items()
            if may_stay(self.heads_of_blocks(layer_work), self.matrix) and (self.left is None or layer in self.left)
        }
        return {layer: ranks[0] for layer, ranks in owners.items() if len(ranks) == 1}

    def num_tested(self, rank: int) -> int:
        """Heads that are tested on a rank, over all layers: those that it adds up, or has whole."""
        return sum(times * _num(dealt[rank]) for _, dealt, times in self._added(rank))

    def num_tested_early(self, rank: int) -> int:
        """Those of them that are tested as they are scored."""
        mine = (layer for layer, owner in self.early.items() if owner == rank)
        return sum(self.heads_of_blocks(self.by_rank[rank][layer]) for layer in mine)

    @staticmethod
    def heads_of_blocks(layer_work: LayerWork) -> int:
        """Heads of a layer's blocks."""
        return sum(len(heads) for block, heads in layer_work.every_head.items() if block in BLOCKS)

    def sent_scores(self, rank: int) -> int:
        """Bytes of partial scores for the ranks that add them up, and of sums for rank 0."""
        if len(self.by_rank) == 1:
            return 0
        config, kept = self.work.config, self.matrix
        if config.output.pairs != "all" and not config.has_many_tasks:
            kept = prod(self.work.num_samples) * self.work.scoring.itemsize - self.own_shares
        sent = 0
        for heads, dealt, times in self._added(rank):
            others = sum(len(set(found) - set(dealt[rank].get(block, ()))) for block, found in heads.items())
            sent += times * others * self.a_head
            sent += times * _num(dealt[rank]) * (kept + self.a_head - self.matrix) if rank else 0
        return sent

    def _added(self, rank: int) -> list[tuple[Heads, list[Heads], int]]:
        """Heads of which a rank has a part, who adds up which, and of how many layers that is so."""
        both = [(layer_work, self._dealt[layer]) for layer, layer_work in self.by_rank[rank].items()]
        counts = Counter((id(layer_work), id(dealt)) for layer_work, dealt in both)
        each = {(id(layer_work), id(dealt)): (layer_work, dealt) for layer_work, dealt in both}
        return [(layer_work.heads, dealt, counts[key]) for key, (layer_work, dealt) in each.items()]

    @cached_property
    def _dealt(self) -> dict[int, list[Heads]]:
        """By layer, the heads that are added up on each rank; all on one that has it whole and tests it early."""
        known: dict[tuple[int, int | None], list[Heads]] = {}
        found = {}
        for layer, layer_work in self.by_rank[0].items():
            heads = {block: part for block, part in layer_work.every_head.items() if block in BLOCKS}
            owner, ranks = self.early.get(layer), range(len(self.by_rank))
            key = id(layer_work), owner
            if key not in known and owner is None:
                known[key] = [*deal_heads(LayerAxes(layer, 1, (), heads), len(ranks))]
            elif key not in known:
                known[key] = [heads if rank == owner else {} for rank in ranks]
            found[layer] = known[key]
        return found

    def _counted(self, rank: int, layers: Sequence[int]) -> list[tuple[LayerWork, int]]:
        """What a rank has of some layers: each thing once, and of how many layers it is."""
        layer_works = [self.by_rank[rank][layer] for layer in layers]
        counts = Counter(map(id, layer_works))
        return [
            (layer_work, counts[n])
            for n, layer_work in {id(layer_work): layer_work for layer_work in layer_works}.items()
        ]

    def _captured(self, layer: int) -> dict[Site, tuple[Projection, SiteWork]]:
        projections = self.work.layout.layer(layer).projections
        sites = self.by_rank[0][layer].sites
        return {Site(layer, projections[s.place].module): (projections[s.place], s) for s in sites}

    def _tiles(self, layer_work: LayerWork, compiled: bool) -> int:
        gradients = layer_work.tile * self.work.scoring.num_samples * self.work.scoring.itemsize
        squares = gradients if self.work.on_gpu else min(CHUNK_BYTES, gradients)
        if compiled:
            heads = heads_at_a_time(sum(map(len, layer_work.heads.values())), self.work.workers)
            squares = 2 * gradients if self.work.on_gpu else squares + heads * self.matrix
        return self.work.workers * (gradients + squares) + (self._pairs(layer_work) if self.work.on_gpu else 0)

    def _pairs(self, layer_work: LayerWork) -> int:
        """Bytes of the scores of the heads that a GPU works on together, and of products in parts."""
        together = min(_num(layer_work.heads) * self.matrix, max(GPU_TILE_BYTES, self.matrix))
        return together + PRODUCTS * BLOCK_PAIRS**2 * self.work.scoring.itemsize

    def _multiplied_factors(self, layer_works: Sequence[tuple[LayerWork, int]], *, packed: bool) -> int:
        """Bytes of two projections' factors in the type of scores, one in work and one on its way; or packed."""
        within, firsts, lasts = [0], [0], [0]
        for layer_work, _ in layer_works:
            order = self._in_order(layer_work)
            pairs = [one + other for one, other in pairwise(order)] or order
            within += [self._copies_of(layer_work, pair, packed) for pair in pairs]
            firsts += [self._copies_of(layer_work, first, packed) for first in order[:1]]
            lasts += [self._copies_of(layer_work, last, packed) for last in order[-1:]]
        several_layers = sum(times for _, times in layer_works) > 1
        return max(*within, max(lasts) + max(firsts) if several_layers else 0)

    def _in_order(self, layer_work: LayerWork) -> list[list[SiteWork]]:
        """Projections in the order in which they are worked on, those together that are worked on as one."""
        order = []
        for place, sites in groupby(layer_work.in_order(), key=lambda site: site.input):
            together = [*sites]
            as_one = place in layer_work.as_one and not any(self.work.kept(site.above).wholes for site in together)
            order += [together] if as_one else [[site] for site in together]
        return order

    def _copies_of(self, layer_work: LayerWork, sites: Sequence[SiteWork], packed: bool) -> int:
        for_bias = {site.input for site in layer_work.sites if site.bias_area}
        of_input = {
            site.place: self._copies(site.cols, site, packed, padded=not packed or site.place in for_bias)
            for site in layer_work.sites
        }
        own = sum(
            self._copies(site.rows, site, packed, padded=not packed or bool(site.bias_area), scaled=True)
            + self._whole_copies(site)
            + self._beside_others(layer_work, site)
            for site in sites
        )
        return own + sum(of_input[place] for place in {site.input for site in sites})

    def _copies(self, width: int, site: SiteWork, packed: bool, *, padded: bool, scaled: bool = False) -> int:
        """A factor as it is multiplied: as a kernel reads it, or padded where samples differ in length (for biases also
        beside a kernel), with D times what samples are scaled by as another copy for a while; of D in half a type
        gradients are scaled.
        """
        scoring, tokens = self.work.scoring, self.work.padded_tokens(site.above)
        copies = int(tokens / LEAST_FILLED) if packed else 0
        copies += tokens if padded and not self.work.of_one_length else 0
        scaled = scaled and padded and self.work.config.metric.sample_scale == "unit"
        copies += tokens if scaled and scoring.product_itemsize == scoring.itemsize else 0
        if self.work.on_gpu or scoring.factor_itemsize != scoring.itemsize:
            copies += self.work.kept(site.above).tokens
        return copies * width * scoring.product_itemsize

    def _beside_others(self, layer_work: LayerWork, site: SiteWork) -> int:
        """D beside that of others with which a projection is worked on as one."""
        tokens = self.work.padded_tokens(site.above) if site.input in layer_work.as_one else 0
        return tokens * site.rows * self.work.scoring.product_itemsize

    def _whole_copies(self, site: SiteWork) -> int:
        copies = 3 if self.work.config.metric.sample_scale == "unit" else 2
        return copies * self.work.kept(site.above).wholes * site.whole * self.work.scoring.itemsize


def _num(heads: Heads) -> int:
    return sum(map(len, heads.values()))
