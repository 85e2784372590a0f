"""By what heads may be chosen to be frozen, as a user of the Python API would choose them; and at random."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np

from qkov_dist.collector import FisherCollector
from qkov_dist.metric import QKOVInterferenceMetric
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.selection import Selection
from qkov_dist.stats.statistics import QKOVStatistics

from .examined_model import BUDGET, ExaminedModel

CRITERIA = ("change_adam", "curvature", "harm", "interference", "overlap")
RANDOM = "random"
PERMUTATIONS = 100  # overlap itself is asked for, not its test


def heatmap_of(examined: ExaminedModel) -> Heatmap:
    """Scores, effects and tests of the samples at the layers examined."""
    memory = BUDGET / 2**20
    collector = FisherCollector(gradient_memory_mb=memory, layers=examined.layers, batch_tokens=examined.batch_tokens)
    with closing(collector):
        collector.collect_fisher(examined.model, examined.a, task="A", mode=examined.estimator)
        collector.collect_fisher(examined.model, examined.b, task="B", mode=examined.estimator)
        heatmap = QKOVInterferenceMetric(collector.config, collector).compute_heatmap("A", "B")
    return heatmap.with_statistics(QKOVStatistics(n_permutations=PERMUTATIONS).test_heatmap(heatmap))


def chosen_by(heatmap: Heatmap, criterion: str, share: float, step: float) -> Selection:
    """The heads that a criterion puts first as harming A; ``step`` is learning rate times number of steps."""
    return heatmap.select(criterion, share=share, step=step if criterion == "harm" else None)


def chosen_at_random(heatmap: Heatmap, share: float, rng: np.random.Generator) -> Selection:
    """As many heads, drawn from all."""
    every = heatmap.select(share=1.0)
    count = len(heatmap.select(share=share))
    places = sorted(rng.permutation(len(every))[:count].tolist())
    return replace(every, by=RANDOM, heads=tuple(every.heads[place] for place in places))
