"""Effects by their definition, on whole gradients: the oracle of influences, and heatmaps that have them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from heatmaps import heatmap_with_tests

from qkov_dist.results.effects import counted_samples
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.influences import COLUMNS, OPTIMIZERS, Samples
from qkov_dist.stats.effect_tests import effect_tests

Floats = np.ndarray


def influences_of(gradients: Floats, regularised: Floats, samples: Samples) -> Floats:
    """[optimizer, column, N] of per-sample gradients [N, P] and R [P], one sample and one optimizer at a time."""
    found = np.zeros((len(OPTIMIZERS), len(COLUMNS), len(gradients)))
    means = {task: gradients[samples.of(task)].mean(0) for task in "ab"}
    squares = {task: (gradients[samples.of(task)] ** 2).mean(0) for task in "ab"}
    for place, scale in enumerate((np.ones_like(regularised), regularised**-0.5)):
        for n, g in enumerate(gradients):
            own, other = ("a", "b") if n < len(gradients) and _is_a(samples, n) else ("b", "a")
            found[place, :, n] = (
                -(g * scale * means[other]).sum(),
                -(g * scale * means[own]).sum(),
                0.5 * (g**2 * (scale * means[other]) ** 2).sum(),
                (squares[other] * scale**2 * means[own] * g).sum(),
                (g**2 * scale).sum(),
            )
    return found


def _is_a(samples: Samples, n: int) -> bool:
    """Whether sample n stands in A's part, counted or not."""
    return n <= int(np.flatnonzero(samples.a)[-1])


def with_made_effects(heatmap: Heatmap, *, size: int = 12, seed: int = 3, shift: float = 0.5) -> Heatmap:
    """A heatmap with the effects of gradients drawn at random; those of some heads conflict, those of others agree."""
    rng = np.random.default_rng(seed)
    num_a, num_b = len(heatmap.samples_a), len(heatmap.samples_b)
    samples = counted_samples(heatmap.samples_a.contents, heatmap.samples_b.contents)
    influences = {}
    for block, mask in heatmap.present.items():
        influences[block] = np.full((*mask.shape, len(OPTIMIZERS), len(COLUMNS), num_a + num_b), np.nan)
        for layer, head in np.argwhere(mask):
            gradients = rng.normal(size=(num_a + num_b, size))
            common = rng.normal(size=size) * rng.choice([0.0, shift, 2 * shift])
            gradients[:num_a] += common
            gradients[num_a:] += common * rng.choice([-1.0, 1.0])
            influences[block][layer, head] = influences_of(gradients, (gradients**2).mean(0) * 1.001, samples)
    made = dataclasses.replace(heatmap, influences=influences)
    return made.with_effects(effect_tests(influences, samples, num_draws=200))


def heatmap_with_effects(**changes: Any) -> Heatmap:
    """The awkward small heatmap, tested, with effects."""
    return with_made_effects(heatmap_with_tests(**changes))
