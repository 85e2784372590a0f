"""Adding partial scores: in one process, on every rank, or each head on the rank that it is dealt to.

Scores and Fisher sums of disjoint rectangles add up, so the partials of all ranks, in any order, give the result of one
process. Dealt heads are added in the order of ranks, so that the sum does not depend on which rank it is formed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from qkov_dist.distributed.world import World
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.scoring.engine import BlockScores
from qkov_dist.scoring.fisher_sums import add, column, no_sums, num_tasks_of, sums_over_ranks
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .metadata import LayerAxes
from .partial_schema import BlockPartial, Floats, LayerPartial


def layer_partial(blocks: Mapping[str, BlockScores]) -> LayerPartial:
    """One layer's scores as they are stored: the heads of which this rank scored an element."""
    heads, shared = {}, {}
    for block, scored in blocks.items():
        touched = np.flatnonzero(column(scored.fisher, "count")).tolist()
        if touched and block in BLOCKS:
            heads[block] = _block_partial(scored, touched)
        elif touched:
            shared[block] = scored.scores[0].cpu().numpy()
    return LayerPartial(heads, shared)


def _block_partial(scored: BlockScores, touched: list[int]) -> BlockPartial:
    heads = np.array([scored.heads[place] for place in touched], np.int64)
    others = (of_heads[touched] for of_heads in (scored.fisher, scored.influences, scored.own_shares))
    return BlockPartial(heads, scored.scores[touched].cpu().numpy(), *others)


def add_layers(parts: Iterable[LayerPartial]) -> LayerPartial:
    """The sum of one layer's partials, head by head; parts may hold different heads.

    They are taken one after another: in memory are their sum and one of them. A single part is returned as it is.
    """
    blocks: dict[str, _BlockSum] = {}
    shared: dict[str, Floats] = {}
    for part in parts:
        for block, of_block in part.blocks.items():
            blocks.setdefault(block, _BlockSum()).add(of_block)
        for name, scores in part.shared.items():
            shared[name] = shared[name] + scores if name in shared else scores
    whole = {block: blocks[block].total() for block in BLOCKS if block in blocks}
    return LayerPartial(whole, dict(sorted(shared.items())))


class _BlockSum:
    """The sum of one block's partials, in the order in which they come. Room for heads doubles where more come."""

    def __init__(self) -> None:
        self._only: BlockPartial | None = None  # the first part, until there is another
        self._rows: dict[int, int] = {}  # by head
        self._sums: BlockPartial | None = None  # [room for heads, ...]

    def add(self, part: BlockPartial) -> None:
        """Add one part; it is left as it is."""
        if self._only is None and self._sums is None:
            self._only = part
            return
        first, self._only = self._only, None
        for one in (part,) if first is None else (first, part):
            self._add(one)

    def total(self) -> BlockPartial:
        """The sum, heads in order."""
        if self._sums is None:
            assert self._only is not None  # there is a sum where there is a part
            return self._only
        heads = sorted(self._rows)
        rows = [self._rows[head] for head in heads]
        at = slice(len(rows)) if rows == sorted(rows) else rows
        return BlockPartial._make([np.array(heads, np.int64), *(array[at] for array in self._sums[1:])])

    def _add(self, part: BlockPartial) -> None:
        for head in part.heads.tolist():
            self._rows.setdefault(head, len(self._rows))
        total = self._sums = self._with_room(part)
        at = np.array([self._rows[head] for head in part.heads.tolist()], np.int64)
        total.scores[at] += part.scores
        total.influences[at] += part.influences
        if part.own_shares.shape[1] == total.own_shares.shape[1]:
            total.own_shares[at] += part.own_shares
        else:  # one of the parts is of a run of before, that formed none
            self._sums = total._replace(own_shares=total.own_shares[:, :0])
        add(total.fisher_sums, part.fisher_sums, at)

    def _with_room(self, like: BlockPartial) -> BlockPartial:
        before, needed = self._sums, len(self._rows)
        if before is None:
            return _no_heads(needed, like)
        if (had := len(before.heads)) >= needed:
            return before
        more = _no_heads(max(needed, 2 * had), before)
        for place, known in zip(more, before, strict=True):
            place[:had] = known
        return more


def _no_heads(num: int, like: BlockPartial) -> BlockPartial:
    """What changes nothing when it is added, for so many heads."""
    scores = np.zeros((num, *like.scores.shape[1:]), like.scores.dtype)
    influences, shares = (np.zeros((num, *of.shape[1:])) for of in (like.influences, like.own_shares))
    sums = no_sums(num, num_tasks_of(like.fisher_sums))
    return BlockPartial(np.zeros(num, np.int64), scores, sums, influences, shares)


def add_over_ranks(part: LayerPartial, layer: LayerAxes, shape: tuple[int, int], world: World) -> LayerPartial:
    """One layer's sum over all ranks, on every rank; all of them call this alike.

    Args:
        part: What this rank scored; heads of which it owns nothing may be missing.
        layer: The layer's heads.
        shape: (samples in the role of i, samples in the role of j).
        world: The ranks.
    """
    if world.size == 1:
        return part
    blocks = {block: _block_over_ranks(part.blocks.get(block), heads, shape, world) for block, heads in _native(layer)}
    names = sorted({name for rank in world.all_gather(sorted(part.shared)) for name in rank})
    dtype = next((scores.dtype for scores in part.shared.values()), np.dtype(np.float32))
    shared = {name: world.all_reduce(part.shared.get(name, np.zeros(shape, dtype))) for name in names}
    return LayerPartial(blocks, shared)


def _native(layer: LayerAxes) -> list[tuple[str, tuple[int, ...]]]:
    return [(block, tuple(layer.heads[block])) for block in BLOCKS if block in layer.heads]


def _block_over_ranks(
    part: BlockPartial | None, heads: tuple[int, ...], shape: tuple[int, int], world: World
) -> BlockPartial:
    wide = any(world.all_gather(part is not None and part.scores.dtype == np.float64))
    scores = np.zeros((len(heads), *shape), np.float64 if wide else np.float32)
    size = max(world.all_gather(0 if part is None else part.influences.shape[-1]))
    of_shares = max(world.all_gather(0 if part is None else part.own_shares.shape[-1]))
    num_tasks = max(world.all_gather(2 if part is None else num_tasks_of(part.fisher_sums)))
    sums, influences = no_sums(len(heads), num_tasks), np.zeros((len(heads), len(OPTIMIZERS), size))
    shares = np.zeros((len(heads), of_shares))
    if part is not None:
        at = np.searchsorted(heads, part.heads)
        scores[at], sums[at], influences[at], shares[at] = part[1:]
    total = sums_over_ranks(sums, world)
    others = (world.all_reduce(array) for array in (influences, shares))
    return BlockPartial(np.array(heads, np.int64), world.all_reduce(scores), total, *others)


def deal_heads(layer: LayerAxes, num_ranks: int) -> list[dict[str, tuple[int, ...]]]:
    """A layer's heads for each rank: about as many each, in the order of blocks."""
    every = [(block, head) for block, heads in _native(layer) for head in heads]
    cuts = [len(every) * rank // num_ranks for rank in range(num_ranks + 1)]
    return [
        {block: tuple(head for b, head in every[low:high] if b == block) for block in BLOCKS}
        for low, high in pairwise(cuts)
    ]


def add_dealt(part: LayerPartial, layer: LayerAxes, world: World) -> LayerPartial:
    """The sum over all ranks of the heads dealt to this one; what no head owns is summed on rank 0.

    Every rank calls this alike. Sent are each head's partial scores, once, to the one rank that adds them.
    """
    if world.size == 1:
        return part
    dealt = deal_heads(layer, world.size)
    return _exchanged([_heads_of(part, heads, rank == 0) for rank, heads in enumerate(dealt)], world)


def bring_to_first(part: LayerPartial, world: World) -> LayerPartial:
    """All ranks' (different) heads on rank 0; nothing elsewhere."""
    if world.size == 1:
        return part
    nothing = LayerPartial({}, {})
    return _exchanged([part if rank == 0 else nothing for rank in range(world.size)], world)


def _exchanged(parts: Sequence[LayerPartial], world: World) -> LayerPartial:
    """Send ``parts[r]`` to rank r, and add what comes here."""
    return add_layers([_unpacked(data) for data in world.all_to_all([_packed(part) for part in parts])])


def _heads_of(part: LayerPartial, heads: Mapping[str, tuple[int, ...]], with_shared: bool) -> LayerPartial:
    blocks = {}
    for block, whole in part.blocks.items():
        at = np.flatnonzero(np.isin(whole.heads, heads[block]))
        if len(at):
            blocks[block] = BlockPartial._make([array[at] for array in whole])
    return LayerPartial(blocks, part.shared if with_shared else {})


def _packed(part: LayerPartial) -> Tensor:
    """One layer's partial as bytes: its shapes as JSON, then its arrays."""
    arrays = [array for block in part.blocks.values() for array in block] + list(part.shared.values())
    described = [[array.dtype.str, list(array.shape)] for array in arrays]
    header = json.dumps([list(part.blocks), list(part.shared), described]).encode()
    pieces = [len(header).to_bytes(8, "little"), header, *(np.ascontiguousarray(array).tobytes() for array in arrays)]
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> LayerPartial:
    raw = data.numpy().tobytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    blocks, shared, described = json.loads(raw[8:start])
    arrays = []
    for dtype, shape in described:
        size = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(raw, dtype, size, start).reshape(shape))
        start += arrays[-1].nbytes
    num, rest = len(BlockPartial._fields), iter(arrays)
    of_blocks = {block: BlockPartial(*islice(rest, num)) for block in blocks}
    return LayerPartial(of_blocks, dict(zip(shared, rest, strict=True)))
