r"""Tests of effects: is the change that a step on one task makes to the other different from 0, head by head?

    z          change / standard error, with Welch's degrees of freedom (``results.influences``)
    p          two-sided, of Student's t; q by Benjamini-Hochberg over the native heads of one block
    p_max      family-wise over all heads of all blocks: the share of random signs e under which the largest |z*| of any
               head is at least |z|; z* is that of the influences' residuals times e, with its own standard error

One draw of signs is for all heads at once, so that what heads have in common is kept. A head whose influences do not
vary says nothing: its p is 1.

The error counts what samples of both tasks do to each other once too often, as a jackknife does: where mean gradients
are small against what samples differ by, p-values are larger than they need be, and errors too wide. Figures are in
the study ``tests/studies/results/effects.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from qkov_dist.results.influences import Estimate, Floats, Samples, changes
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .head_tests import q_values

ByBlock = Mapping[str, Floats]
FEW = 16  # samples of a task: with fewer, what they may lack is told
UNEVEN = 0.75  # samples that count as fewer alike than this share of them are told of
RARE_OPPONENTS, UNEVEN_COVERED = "27%", "71 to 95%"
_CHUNK_BYTES = 256 << 10  # of an array [heads, draws]: those in work lie in a cache


def effect_tests(
    influences: ByBlock, samples: Samples, *, num_draws: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, dict[str, dict[str, Floats]]]:
    """Effects of both optimizers, tested.

    Args:
        influences: Block -> [layer, native head, optimizer, N], NaN for absent heads.
        samples: Which samples count.
        num_draws: Draws of signs for the family-wise p-value.
        seed: Of the draws.
        confidence: Of the intervals.

    Returns:
        Block -> optimizer -> name (``results.effects.TESTED_KEYS``) -> float64 [layer, native head].
    """
    found: dict[str, dict[str, dict[str, Floats]]] = {block: {} for block in influences}
    for place, optimizer in enumerate(OPTIMIZERS):
        of_optimizer = {block: of_block[:, :, place] for block, of_block in influences.items()}
        tested = mean_tests(of_optimizer, samples, num_draws=num_draws, seed=seed, confidence=confidence)
        for block, arrays in tested.items():
            found[block][optimizer] = arrays
    return found


def mean_tests(
    values: ByBlock, samples: Samples, *, num_draws: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, dict[str, Floats]]:
    """The same of one quantity: block -> name -> float64 [layer, native head].

    Args:
        values: Block -> [layer, native head, N], whose mean over either task's samples is what is tested, and whose
            spread within each is its error: influences, or the pseudo-values of a jackknife.
        samples: Which samples count.
        num_draws: Draws of signs for the family-wise p-value.
        seed: Of the draws.
        confidence: Of the intervals.
    """
    largest = _largest_z(values, samples, num_draws, seed)
    return {block: _tests(changes(of_block, samples), largest, confidence) for block, of_block in values.items()}


def _tests(estimate: Estimate, largest: Floats, confidence: float) -> dict[str, Floats]:
    low, high = estimate.interval(confidence)
    p_value = estimate.p_value()
    return {
        "change": estimate.value,
        "standard_error": estimate.standard_error,
        "ci_low": low,
        "ci_high": high,
        "p_value": p_value,
        "q_value": q_values(p_value, "bh"),
        "p_max": _family_wise(estimate.z(), largest),
    }


def _family_wise(z: Floats, largest: Floats) -> Floats:
    ordered = np.sort(largest)
    beyond = len(ordered) - np.searchsorted(ordered, np.abs(z), side="left")
    return np.where(np.isnan(z), np.nan, (1 + beyond) / (1 + len(ordered)))


def _largest_z(influences: ByBlock, samples: Samples, num_draws: int, seed: int) -> Floats:
    """The largest |z*| of any head under each draw of signs, [draws]."""
    num = len(samples.a)
    signs = np.random.default_rng((seed, num, 1)).choice((-1.0, 1.0), size=(num, num_draws))
    largest = np.zeros(num_draws)
    if min(samples.sizes) < 2:
        return largest
    for of_heads in _chunks(influences, num_draws):
        of_a, of_b = (_flipped(of_heads[:, chosen], signs[chosen]) for chosen in (samples.a, samples.b))
        error = np.sqrt(of_a[1] + of_b[1])
        z = np.divide(np.abs(of_a[0] + of_b[0]), error, out=np.zeros_like(error), where=error > 0)
        np.maximum(largest, z.max(axis=0, initial=0.0), out=largest)
    return largest


def _chunks(influences: ByBlock, num_draws: int) -> Iterator[Floats]:
    """Influences [heads, N] of present heads, some at a time."""
    step = max(_CHUNK_BYTES // (8 * num_draws), 1)
    for of_block in influences.values():
        of_heads = of_block.reshape(-1, of_block.shape[-1])
        present = of_heads[~np.isnan(of_heads).any(axis=1)]
        for start in range(0, len(present), step):
            yield present[start : start + step]


def _flipped(values: Floats, signs: Floats) -> tuple[Floats, Floats]:
    """Mean of one task's residuals [heads, n] under each draw [n, draws], and the variance of that mean."""
    num = values.shape[1]
    residuals = values - values.mean(axis=1, keepdims=True)
    means = residuals @ signs / num
    spread = (residuals**2).sum(axis=1, keepdims=True) - num * means**2
    return means, np.maximum(spread, 0.0) / (num * (num - 1))


def even_samples(influences: ByBlock, samples: Samples) -> tuple[float, float]:
    """As how many samples of one size those of A, and those of B, count (Kish): fewer where a few are loud.

    A sample's size is that of its influences, each head's as a multiple of what is usual in that head.
    """
    of_heads = np.concatenate([np.moveaxis(x, -1, 0).reshape(x.shape[-1], -1) for x in influences.values()], axis=1)
    of_heads = of_heads[:, ~np.isnan(of_heads).any(axis=0)]
    found = []
    for chosen in (samples.a, samples.b):
        squares = of_heads[chosen] ** 2
        usual = squares.mean(axis=0) if len(squares) else np.zeros(squares.shape[1])
        sizes = np.sqrt((squares[:, usual > 0] / usual[usual > 0]).sum(axis=1))
        found.append(float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else float(len(sizes)))
    return found[0], found[1]


def notes_on_effects(influences: ByBlock, samples: Samples) -> list[str]:
    """What a reader of effects must know, one sentence each; figures are those of the study of calibration."""
    notes = []
    if num := len(samples.a) - sum(samples.sizes):
        notes.append(f"Effects leave out {num} samples that both tasks have.")
    fewest = min(samples.sizes)
    if fewest < 2:
        return [*notes, "Effects are without errors and tests: a task has fewer than two samples of its own."]
    if fewest < FEW:
        notes.append(
            f"Effects rest on {fewest} samples of a task, which may lack a kind of samples that is rare: where one in "
            f"eight opposes the others, {RARE_OPPONENTS} of tests with 8 samples were wrong at a level of 5%."
        )
    for task, num, alike in zip("AB", samples.sizes, even_samples(influences, samples), strict=True):
        if alike < UNEVEN * num:
            notes.append(
                f"Intervals of effects may be too narrow: a few samples of task {task} are loud, so that {num} count "
                f"as {alike:.0f} alike. Under such, intervals of 95% held {UNEVEN_COVERED} of true changes."
            )
    return notes
