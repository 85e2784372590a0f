"""One measured property, and how scores are compared to measure it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from qkov_dist.layout.heads import BLOCKS
from qkov_dist.scoring.settings import ScoreSettings

from .examined_model import Scores

PLAIN = ScoreSettings()


@dataclass(frozen=True)
class PropertyResult:
    """One measured property.

    Attributes:
        check: Which of the six.
        what: What was compared.
        deviation: What was measured.
        bound: What it may be at most; None where the number is reported, not judged.
        note: Where it was measured, or why it was not.
    """

    check: str
    what: str
    deviation: float | None
    bound: float | None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the property holds; None where it is only reported or does not apply."""
        if self.deviation is None or self.bound is None:
            return None
        return self.deviation <= self.bound


def farthest(got: dict[int, dict[str, Tensor]], expected: dict[int, dict[str, Tensor]]) -> float:
    """Largest deviation of any pair, as a share of the block's largest score in that layer."""
    return max(
        float(
            (got[layer][block].double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-300)
        )
        for layer, blocks in expected.items()
        for block, wanted in blocks.items()
    )


def head_means(scores: Scores) -> dict[str, np.ndarray]:
    """Block -> mean score of every head of every layer."""
    means: dict[str, list[np.ndarray]] = {}
    for blocks in scores.values():
        for block in BLOCKS:
            if block in blocks:
                means.setdefault(block, []).append(blocks[block].double().mean(dim=(1, 2)).cpu().numpy())
    return {block: np.concatenate(parts) for block, parts in means.items()}


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's rank correlation of heads' means; None of fewer than three heads."""
    return float(spearmanr(one, other).statistic) if len(one) > 2 else None
