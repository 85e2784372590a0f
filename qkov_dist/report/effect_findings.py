"""What a head's effect shows: whether a step on either task, in this head alone, raises or lowers the other's loss.

    change    significantly above 0    conflict
              significantly below 0    synergy

These are findings of their own beside those of scores (``findings``): what a step does is one question, and whether the
tasks use the same weights another. The null is 0; the band is that of 0 with the change's own standard error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import Floats
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .findings import Finding

EFFECTS = (
    Finding("conflict", "above", "up", "▲", "a step on either task, in this head alone, raises the other task's loss"),
    Finding("synergy", "below", "down", "▼", "such a step lowers the other task's loss"),
)
BY = OPTIMIZERS[-1]  # adam: what training does


def effects_of(heatmap: Heatmap, block: str, optimizer: str) -> Mapping[str, Floats]:
    """Name -> [layer, native head] of one block's effects; empty where none are known, or none tested."""
    return (heatmap.effects or {})[block][optimizer] if heatmap.has_tested_effects else {}


def found_by_change(heatmap: Heatmap, block: str, optimizer: str = BY) -> npt.NDArray[np.int64]:
    """1 + the place in ``EFFECTS`` of what each head shows, 0 where its change may be 0; [layer, native head]."""
    codes = np.zeros(heatmap.mean[block].shape, np.int64)
    if arrays := effects_of(heatmap, block, optimizer):
        is_significant = arrays["q_value"] <= heatmap.fdr_alpha
        codes[is_significant & (arrays["change"] > 0)] = 1
        codes[is_significant & (arrays["change"] < 0)] = 2
    return codes


def is_family_wise_change(heatmap: Heatmap, block: str, optimizer: str = BY) -> npt.NDArray[np.bool_]:
    """Which of these heads also hold over all heads of all blocks, [layer, native head]."""
    held = found_by_change(heatmap, block, optimizer) > 0
    if arrays := effects_of(heatmap, block, optimizer):
        held &= arrays["p_max"] <= heatmap.fdr_alpha
    return held


def effect_counts(heatmap: Heatmap, optimizer: str = BY) -> dict[Finding, int]:
    """How many heads of all blocks show each of them; empty in files that know no effects."""
    if not heatmap.has_tested_effects:
        return {}
    codes = np.concatenate([found_by_change(heatmap, block, optimizer).ravel() for block in heatmap.blocks])
    return {finding: int((codes == code).sum()) for code, finding in enumerate(EFFECTS, 1)}


def effect_name(code: int) -> str | None:
    """The word for a number of ``found_by_change``; None for 0."""
    return EFFECTS[code - 1].name if code else None


def how_effects_were_tested(heatmap: Heatmap) -> Iterator[str]:
    """Sentences on what a change is, its interval and its tests."""
    a, b = heatmap.counted.sizes
    yield (
        "Change: what a unit step (learning rate x number of steps = 1) on either task does to the other's loss, to "
        "first order."
    )
    yield f"Intervals: Student's t with Welch's degrees of freedom, from the influences of {a} + {b} samples."
    yield "q: two-sided against 0, Benjamini-Hochberg in each block; family-wise p: over all heads, by random signs."
    yield "Sums over heads are meaningful: shares are of the whole of attention."
