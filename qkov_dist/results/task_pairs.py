"""Two of many tasks: what a run of these two would have of a layer, but for the Fisher, which is that of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qkov_dist.scoring import fisher_sums, influence_records, own_share_records
from qkov_dist.scoring.influence_sums import parts_of

from .partial_schema import BlockPartial, Floats, LayerPartial


def of_pair(part: LayerPartial, sizes: Sequence[int], a: int, b: int, *, pooled: bool) -> LayerPartial:
    """One layer's partial of two tasks.

    Args:
        part: That of all tasks, [heads, N, N] among all pooled samples.
        sizes: Samples of each task.
        a: One of the tasks, by number.
        b: A later one.
        pooled: Whether scores are to be among all samples of the two, A's first, rather than A x B.
    """
    parts = parts_of(sizes)
    both = np.r_[parts[a], parts[b]]

    def scores_of(scores: Floats) -> Floats:
        if pooled:
            return scores[..., both[:, None], both]
        return scores[..., parts[a], parts[b]]

    blocks = {block: _block(found, scores_of(found.scores), sizes, a, b) for block, found in part.blocks.items()}
    return LayerPartial(blocks, {name: scores_of(scores) for name, scores in part.shared.items()})


def scores_of_pair(scores: Tensor, sizes: Sequence[int], a: int, b: int) -> Tensor:
    """Scores [..., N, N] among all pooled samples -> those among the samples of two tasks, where they are."""
    parts = parts_of(sizes)
    rows = torch.cat([scores[..., parts[a], :], scores[..., parts[b], :]], -2)
    return torch.cat([rows[..., parts[a]], rows[..., parts[b]]], -1)


def _block(found: BlockPartial, scores: Floats, sizes: Sequence[int], a: int, b: int) -> BlockPartial:
    influences = found.influences
    if influences.shape[-1]:  # effects were not left out
        influences = influence_records.of_pair(influences, sizes, a, b)
    shares = found.own_shares
    if shares.shape[-1]:
        shares = own_share_records.of_pair(shares, sizes, a, b)
    return BlockPartial(found.heads, scores, fisher_sums.of_pair(found.fisher_sums, a, b), influences, shares)
