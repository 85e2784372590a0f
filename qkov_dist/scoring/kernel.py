"""The metric on one tile, in place and in cache; :mod:`qkov_dist.scoring.score` says what it computes.

A tile's gradients [N, P], as :mod:`~qkov_dist.scoring.tile_gradients` forms them, are squared, summed into the Fisher,
mapped in place and multiplied into the scores of all pairs: on a CPU in chunks of columns that stay in a core's cache,
on a GPU whole, for several heads side by side [N, heads, P] and in as many parts of P as fill it, or by ``pair_kernel``
where that is faster. A worker keeps its buffers from tile to tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .influence_sums import InfluenceSums, effect_products, num_vectors
from .own_shares import Chosen, OwnShares
from .padded_groups import PaddedGroup
from .pair_kernel import PairKernel
from .score import Fused, maps, mirror, power_of, regularised
from .score_kinds import KINDS, ElementMap, Score
from .tile_gradients import Buffers

CHUNK_BYTES = 4 * 2**20  # of gradients; with their squares this is what lies near a core, and a tile of few samples
PRODUCTS = 512  # blocks of pairs that are multiplied at a time on a GPU: some for each of its multiprocessors
BLOCK_PAIRS, LEAST_PART = 128, 512  # rows and columns of such a block; the fewest elements that are summed for it
HALF_PAIRS = 48  # rows of a block of a symmetric product on a CPU, of which those left of the diagonal are left out


@dataclass(frozen=True)
class Rule:
    """The score and its regularisation, for heads of one layer.

    Attributes:
        score: Which score.
        epsilon: Floor of I.
        ridges: lambda of all heads that are worked on together, or of each: it is that of its block.
        left: Samples in the role of i, in the order of the gradients' rows.
        right: Samples in the role of j.
        fused: The elementwise part, compiled; None maps in place.
        pairs: What forms maps and their products at once; None has torch's products do it.
    """

    score: Score
    epsilon: float
    ridges: tuple[float, ...]
    left: slice
    right: slice
    fused: Fused | None = None
    pairs: PairKernel | None = None

    @property
    def is_symmetric(self) -> bool:
        """Whether the scores of all pairs are a symmetric matrix."""
        return self.left == self.right and KINDS[self.score].is_symmetric

    @property
    def least(self) -> tuple[float, ...]:
        """What I must exceed to have a say, of all heads or of each: the larger of epsilon and lambda."""
        return tuple(max(self.epsilon, ridge) for ridge in self.ridges)

    def in_cache(self, heads: int, device: torch.device) -> bool:
        """Whether a tile is worked on in chunks that lie near a core: on a CPU, a head at a time."""
        return heads == 1 and device.type == "cpu" and not self.fused

    def may_vanish(self, dtype: torch.dtype) -> bool:
        """Whether R may be so small in a dtype that 1 / R is infinite: where nothing but I keeps it above 0."""
        return min(self.least) * torch.finfo(dtype).max <= 1


def add_tile(
    scores: Tensor,
    gradients: Tensor,
    weights: Tensor,
    rule: Rule,
    buffers: Buffers,
    effects: InfluenceSums | None = None,
    own: tuple[OwnShares, Chosen] | None = None,
) -> Tensor:
    """Add the contribution of a tile, or of the tiles of several heads, to the scores of all pairs.

    Args:
        scores: [heads, left, right], added to.
        gradients: Per-sample gradients [N, heads, P]; used up.
        weights: Each sample's weight in the Fisher, by task [T, N].
        rule: The score.
        buffers: The worker's.
        effects: What samples have to do with effects, added to; None leaves them out.
        own: What their own shares of the Fisher do, added to, and the elements looked at; None leaves it out.

    Returns:
        What each task adds to the Fisher, [T, heads, P].
    """
    num, heads, size = gradients.shape
    flat = gradients.view(num, heads * size)
    by_task = flat.new_empty(len(weights), heads * size)
    if rule.may_vanish(flat.dtype):
        rule = replace(rule, fused=None, pairs=None)
    kept = None if own is None else own[0].kept(flat, own[1])  # gradients are used up
    if rule.pairs is not None:
        _add_in_two_passes(scores, flat, weights, by_task, rule, rule.pairs, buffers, effects)
    else:
        _add_in_chunks(scores, flat, weights, by_task, rule, buffers, effects)
    if own is not None and kept is not None:
        own[0].add(kept, by_task[:, own[1].places].sum(0))
    return by_task.view(len(weights), heads, size)


def _add_in_chunks(
    scores: Tensor,
    flat: Tensor,
    weights: Tensor,
    by_task: Tensor,
    rule: Rule,
    buffers: Buffers,
    effects: InfluenceSums | None,
) -> None:
    """Add the tile of a head chunk by chunk, or those of several heads [N, heads * P] at once."""
    (num, size), in_cache = flat.shape, rule.in_cache(len(scores), flat.device)
    step = max(CHUNK_BYTES // (num * flat.element_size()), 1) if in_cache else size
    for start in range(0, size, step):
        chunk = slice(start, start + step)
        of_i, of_j = _maps(flat[:, chunk], weights, by_task[:, chunk], rule, buffers, effects)
        if in_cache:
            _add_pairs_of_head(scores[0], of_i[rule.left], of_j[rule.right], symmetric=rule.is_symmetric)
        else:
            _add_pairs(scores, of_i[rule.left], of_j[rule.right])
    if in_cache and rule.is_symmetric:
        mirror(scores[0])


def _add_in_two_passes(
    scores: Tensor,
    flat: Tensor,
    weights: Tensor,
    by_task: Tensor,
    rule: Rule,
    pairs: PairKernel,
    buffers: Buffers,
    effects: InfluenceSums | None,
) -> None:
    """Add the tiles of several heads [N, heads * P], whose maps are never in memory."""
    pairs.put_squares(flat, weights, by_task)
    inverse = _inverse(by_task, rule)
    if effects is not None:
        squares = _squares(flat, buffers) if effects.needs_squares else None
        _add_effects(effects, flat, squares, by_task, inverse, rule, buffers)
    pairs.add_pairs(scores, flat, inverse, KINDS[rule.score], rule.left, rule.right)


def _maps(
    part: Tensor, weights: Tensor, by_task: Tensor, rule: Rule, buffers: Buffers, effects: InfluenceSums | None
) -> tuple[Tensor, Tensor]:
    """The maps of gradients [N, p]; into ``by_task`` [T, p] goes what each task adds to the Fisher."""
    if rule.fused:
        of_tasks, of_i, of_j = rule.fused(part, weights, _floor(part, rule), rule.score)
        by_task.copy_(of_tasks)
        if effects is not None:
            squares = _squares(part, buffers) if effects.needs_squares else None
            _add_effects(effects, part, squares, by_task, _inverse(by_task, rule), rule, buffers)
        return of_i, of_j
    squares = _squares(part, buffers)
    torch.mm(weights, squares, out=by_task)
    inverse = _inverse(by_task, rule)
    if effects is not None:
        _add_effects(effects, part, squares, by_task, inverse, rule, buffers)
    if rule.may_vanish(part.dtype) or not KINDS[rule.score].maps_in_place:
        return maps(part, inverse, rule.score)
    return _mapped(part, squares, inverse, rule.score)


def _squares(part: Tensor, buffers: Buffers) -> Tensor:
    squares = buffers.take("squares", (part.shape[0], part.shape[1]), part.dtype, part.device)
    return torch.mul(part, part, out=squares)


def _inverse(by_task: Tensor, rule: Rule) -> Tensor:
    """1 / R [p]."""
    return regularised(by_task.sum(0), rule.epsilon, rule.ridges).reciprocal_()


def _floor(part: Tensor, rule: Rule) -> Tensor:
    """Epsilon and lambda at each element [2, p], without a copy from the host."""
    floor = part.new_empty(2, part.shape[1])
    floor[0].fill_(rule.epsilon)
    floor[1].fill_(0.0)
    regularised(floor[1], 0.0, rule.ridges)
    return floor


def _add_effects(
    effects: InfluenceSums,
    part: Tensor,
    squares: Tensor | None,
    by_task: Tensor,
    inverse: Tensor,
    rule: Rule,
    buffers: Buffers,
) -> None:
    finite = inverse.masked_fill(inverse.isinf(), 0.0) if rule.may_vanish(part.dtype) else inverse
    vectors = buffers.take("vectors", (num_vectors(effects.num_tasks), part.shape[1]), part.dtype, part.device)
    effects.add(part, squares, by_task, finite, vectors)


def _add_pairs_of_head(scores: Tensor, of_i: Tensor, of_j: Tensor, *, symmetric: bool) -> None:
    """Add the products of all pairs to scores [left, right] of one head; of symmetric ones, on and above the diagonal.

    Below it, blocks along the diagonal have what they need not have.
    """
    step = HALF_PAIRS if symmetric else max(len(of_i), 1)
    for start in range(0, len(of_i), step):
        first = start if symmetric else 0
        scores[start : start + step, first:].addmm_(of_i[start : start + step], of_j[first:].t())


def _add_pairs(scores: Tensor, of_i: Tensor, of_j: Tensor) -> None:
    """Add the products of all pairs, [left, heads * p] and [right, heads * p], to scores [heads, left, right]."""
    heads, left, right = scores.shape
    parts = num_parts(heads, left, right, of_i.shape[1] // heads)
    rows, columns = (maps.view(maps.shape[0], heads * parts, -1).transpose(0, 1) for maps in (of_i, of_j))
    if parts == 1:
        scores.baddbmm_(rows, columns.transpose(1, 2))
    else:
        scores += torch.bmm(rows, columns.transpose(1, 2)).view(heads, parts, left, right).sum(1)


def num_parts(heads: int, left: int, right: int, size: int) -> int:
    """Into how many parts of ``size`` elements a product of all pairs is cut, so that all of a GPU has work."""
    blocks, parts = heads * -(-left // BLOCK_PAIRS) * -(-right // BLOCK_PAIRS), 1
    while size % (2 * parts) == 0 and size // (2 * parts) >= LEAST_PART and 2 * parts * blocks <= PRODUCTS:
        parts *= 2
    return parts


def _mapped(gradients: Tensor, squares: Tensor, inverse: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """:func:`qkov_dist.scoring.score.maps`, in place, where no 1 / R is infinite."""
    kind = KINDS[score]
    left = _map_in_place(kind.left, gradients, squares).mul_(power_of(inverse, kind.weight_power))
    return left, left if kind.is_symmetric else _map_in_place(kind.right, gradients, squares)


def _map_in_place(which: ElementMap, gradients: Tensor, squares: Tensor) -> Tensor:
    if which == "square":
        return squares
    return gradients.abs_() if which == "magnitude" else gradients


def pair_products(left: int, right: int, *, in_half: bool) -> int:
    """Products of an element's maps for all pairs; of a symmetric result in blocks of rows, from the diagonal on."""
    if not in_half:
        return left * right
    return sum(min(HALF_PAIRS, left - start) * (right - start) for start in range(0, left, HALF_PAIRS))


def tile_flops(
    groups: Sequence[PaddedGroup], size: int, pairs: int, *, bias: bool, effects: InfluenceSums | None = None
) -> int:
    """Floating-point operations of the matrix products of a tile of ``size`` elements, padding included.

    Gradients that are kept were formed before.

    Args:
        groups: All groups of samples.
        size: Elements.
        pairs: Products of an element's maps (``pair_products``).
        bias: Whether it is a bias.
        effects: Where effects are added up; None leaves them out.
    """
    num = groups[-1].last
    num_tasks = 2 if effects is None else effects.num_tasks
    tokens = 0 if bias else sum((group.last - group.first) * group.length for group in groups)
    of_effects = 0 if effects is None else effect_products(len(effects.means.weights), effects.num_tasks)
    return 2 * size * (tokens + num_tasks * num + pairs + of_effects)
