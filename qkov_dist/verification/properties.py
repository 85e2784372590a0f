"""Six properties that right scores have, measured on a user's own model.

    additivity         sum over native heads = the block scored without slicing; = the sum over simulated ranks
    scale              c x loss: c x M;  V <- cV with O <- O/c: M^V / c, c M^O, and nothing else
    ablation           a head whose output is cut off, or whose values are zero, scores exactly 0 where it must
    symmetry           signed, symmetric, curvature: M_AB^T = M_BA under one Fisher
    layout             every slice answers to its own perturbation, and no other
    batch invariance   a sample in a batch has the gradient that it has alone

Scores use no ridge and no floor where a property needs it. Deviations are shares of the block's largest score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from qkov_dist.distributed.ownership import Owned
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Projection
from qkov_dist.layout.proof import prove
from qkov_dist.layout.rects import Rect, rects_of_flat_interval
from qkov_dist.scoring.score_kinds import KINDS

from .changed_model import check_ablation, check_scale
from .examined_model import Captured, ExaminedModel
from .property_result import PLAIN, PropertyResult, farthest, head_means, rank_correlation
from .unsliced import unsliced, whole_gradients

ADDITIVE, TRANSPOSED = 1e-4, 1e-6
# A batch changes the order of sums in the model's own kernels: float32 eps times depth, or the type's own precision.
BATCHED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
NUM_RANKS = 3
TOP = 10


def run_checks(examined: ExaminedModel) -> Iterator[PropertyResult]:
    """Measure all six properties, one after the other.

    Raises:
        QkovError: where the model cannot be run at all.
    """
    yield from check_layout(examined)
    with examined.captured() as captured:
        yield from check_additivity(captured)
        yield from check_symmetry(captured)
        yield from check_batch_invariance(captured)
        yield from check_scale(captured)
        yield from check_ablation(captured)


def check_layout(examined: ExaminedModel) -> Iterator[PropertyResult]:
    """Every slice of every layer, perturbed."""
    try:
        rows = prove(examined.model, examined.layout)
    except QkovError as error:
        yield PropertyResult("layout", "slices that answer wrongly", 1, 0, str(error))
        return
    yield PropertyResult("layout", "slices that answer wrongly", 0, 0, f"{len(rows)} slices perturbed")


def check_additivity(captured: Captured) -> Iterator[PropertyResult]:
    """Heads against the whole block, and ranks against one process."""
    scores = captured.scores(PLAIN)
    whole = {layer.index: unsliced(captured, layer) for layer in captured.examined.attention_layers}
    summed = {layer: {block: part.sum(dim=0) for block, part in blocks.items()} for layer, blocks in scores.items()}
    yield PropertyResult("additivity", "sum over heads - unsliced block", farthest(summed, whole), ADDITIVE)
    partials = [captured.scores(PLAIN, owned=_simulated_rank(rank)) for rank in range(NUM_RANKS)]
    by_ranks = {
        layer: {block: torch.stack([partial[layer][block] for partial in partials]).sum(dim=0) for block in blocks}
        for layer, blocks in scores.items()
    }
    yield PropertyResult(
        "additivity", f"sum over {NUM_RANKS} ranks - one process", farthest(by_ranks, scores), ADDITIVE
    )


def check_symmetry(captured: Captured) -> Iterator[PropertyResult]:
    """Both directions under one Fisher."""
    for score in (name for name, kind in KINDS.items() if kind.is_symmetric):
        settings = replace(PLAIN, score=score)
        there, back = captured.scores(settings), captured.scores(settings, swapped=True)
        turned = {layer: {b: part.transpose(1, 2) for b, part in blocks.items()} for layer, blocks in back.items()}
        yield PropertyResult("symmetry", f"{score}: M_AB^T - M_BA", farthest(turned, there), TRANSPOSED)
    there, back = captured.scores(PLAIN), captured.scores(PLAIN, swapped=True)
    means = [head_means(scores) for scores in (there, back)]
    for block in means[0]:
        one, other = means[0][block], means[1][block]
        top = min(TOP, len(one))
        common = len({*np.argsort(one)[-top:]} & {*np.argsort(other)[-top:]})
        note = f"interference {block}: reported only; {common} of the top {top} heads in common"
        yield PropertyResult("symmetry", "rank correlation of A->B and B->A", rank_correlation(one, other), None, note)


def check_batch_invariance(captured: Captured) -> Iterator[PropertyResult]:
    """Each sample's gradients, in the run's batches and alone."""
    examined = captured.examined
    dtype = next(p.dtype for p in examined.model.parameters() if p.is_floating_point())
    worst = 0.0
    with examined.captured(one_by_one=True) as alone:
        for layer in examined.attention_layers:
            for projection in layer.projections:
                in_batch, single = (whole_gradients(c, layer, projection) for c in (captured, alone))
                difference = (in_batch - single).flatten(1).abs().amax(dim=1)
                worst = max(worst, float((difference / single.flatten(1).abs().amax(dim=1).clamp_min(1e-300)).max()))
    yield PropertyResult(
        "batch invariance", "gradient in a batch - alone", worst, BATCHED[dtype], "share of its largest element"
    )


def _simulated_rank(rank: int) -> Owned:
    """A flat partition of each weight, which cuts across rows, heads and blocks."""

    def owned(projection: Projection, bias: bool) -> tuple[Rect, ...]:
        whole = projection.whole(bias)
        start, stop = (whole.area * n // NUM_RANKS for n in (rank, rank + 1))
        return rects_of_flat_interval(start, stop, whole.shape[1])

    return owned
