"""Effects by their definition, on whole gradients: the oracle of influences, and heatmaps that have them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from heatmaps import heatmap_with_tests

from qkov_dist.finish import with_tested_effects
from qkov_dist.results.effects import counted_samples, untested_effects
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import Samples
from qkov_dist.scoring.influence_records import OPTIMIZERS, SUMS, of_samples
from qkov_dist.stats.statistics import QKOVStatistics

Floats = np.ndarray


def records_of(gradients: Floats, regularised: Floats, samples: Samples, num_a: int) -> Floats:
    """A record [optimizer, sums and N] of per-sample gradients [N, P] and R [P], one sample and optimizer at a time."""
    found = np.zeros((len(OPTIMIZERS), len(SUMS) + len(gradients)))
    mean_a, mean_b = (gradients[chosen].mean(0) for chosen in (samples.a, samples.b))
    squares_a, squares_b = ((gradients[chosen] ** 2).mean(0) for chosen in (samples.a, samples.b))
    for place, scale in enumerate((np.ones_like(regularised), regularised**-0.5)):
        found[place, : len(SUMS)] = (
            0.5 * (squares_a * (scale * mean_b) ** 2).sum(),
            0.5 * (squares_b * (scale * mean_a) ** 2).sum(),
            -(mean_a * scale * mean_a).sum(),
            -(mean_b * scale * mean_b).sum(),
            (squares_a * scale).sum(),
            (squares_b * scale).sum(),
        )
        for n, g in enumerate(gradients):
            found[place, len(SUMS) + n] = -(g * scale * (mean_b if n < num_a else mean_a)).sum()
    return found


def with_made_effects(heatmap: Heatmap, *, size: int = 12, seed: int = 3, shift: float = 0.5) -> Heatmap:
    """A heatmap with the effects of gradients drawn at random; those of some heads conflict, those of others agree."""
    rng = np.random.default_rng(seed)
    num_a, num_b = len(heatmap.samples_a), len(heatmap.samples_b)
    samples = counted_samples(heatmap.samples_a.contents, heatmap.samples_b.contents)
    records = {}
    for block, mask in heatmap.present.items():
        records[block] = np.full((*mask.shape, len(OPTIMIZERS), len(SUMS) + num_a + num_b), np.nan)
        for layer, head in np.argwhere(mask):
            gradients = rng.normal(size=(num_a + num_b, size))
            common = rng.normal(size=size) * rng.choice([0.0, shift, 2 * shift])
            gradients[:num_a] += common
            gradients[num_a:] += common * rng.choice([-1.0, 1.0])
            records[block][layer, head] = records_of(gradients, (gradients**2).mean(0) * 1.001, samples, num_a)
    influences = {block: of_samples(of_block) for block, of_block in records.items()}
    untested = {block: untested_effects(of_block, samples) for block, of_block in records.items()}
    made = dataclasses.replace(heatmap, influences=influences, effects=untested)
    return with_tested_effects(made, QKOVStatistics(n_permutations=200))


def heatmap_with_effects(**changes: Any) -> Heatmap:
    """The awkward small heatmap, tested, with effects."""
    return with_made_effects(heatmap_with_tests(**changes))
