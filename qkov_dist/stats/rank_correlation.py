"""Do two runs rank heads alike: Spearman's correlation over native heads, with an interval.

Heads are all there are of a model, no sample of more: what is uncertain is the samples they were measured on. So the
interval is that of a delete-one jackknife over samples, on the scale of its arcsine (finite at 1), with Welch's degrees
of freedom. A sample of paired runs is left out of both at once. Where a quantity is known without its samples, the
interval is a percentile bootstrap over heads (``by`` says ``heads``): how far a few heads decide the number.

Noise lowers a rank correlation: two runs on other samples of one model stay below 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from scipy.stats import t as student

from qkov_dist.results.influences import Floats

from .sample_values import SampleValues, without_each

FEWEST = 3  # heads
_RESAMPLES = 1000


class Correlation(NamedTuple):
    """A rank correlation with both ends of its interval, NaN where there is none, and over what the interval is."""

    value: float
    low: float
    high: float
    by: Literal["samples", "heads", ""]


def rank_correlation(
    first: SampleValues, second: SampleValues, block: str, *, paired: bool, confidence: float = 0.95, seed: int = 0
) -> Correlation:
    """Of the heads of one block that both runs know.

    Args:
        first: A quantity of one run.
        second: The same of another; of paired runs with its samples in the same order.
        block: Q, K, V or O.
        paired: Whether both are of the same samples.
        confidence: Of the interval.
        seed: Of the bootstrap.
    """
    there = np.isfinite(first.values[block]) & np.isfinite(second.values[block])
    if there.sum() < FEWEST:
        return Correlation(np.nan, np.nan, np.nan, "")
    one, other = first.values[block][there], second.values[block][there]
    value = float(spearman(one, other))
    if np.isnan(value):
        return Correlation(value, np.nan, np.nan, "")
    if first.of_samples is None or second.of_samples is None:
        return Correlation(value, *_over_heads(one, other, confidence, seed), "heads")
    groups = list(_left_out(first, second, block, there, paired=paired))
    return Correlation(value, *_over_samples(value, groups, confidence), "samples")


def spearman(first: Floats, second: Floats) -> Floats:
    """Of the last axis; NaN where either does not vary."""
    return _pearson(*(rankdata(values, axis=-1) for values in (first, second)))


def _pearson(first: Floats, second: Floats) -> Floats:
    one, other = (values - values.mean(-1, keepdims=True) for values in (first, second))
    sizes = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    found: Floats = np.divide((one * other).sum(-1), sizes, out=np.full(np.shape(sizes), np.nan), where=sizes > 0)
    return found


def _left_out(
    first: SampleValues, second: SampleValues, block: str, there: npt.NDArray[np.bool_], *, paired: bool
) -> Iterator[Floats]:
    """For each group of samples, the correlation without each of its samples [n]."""
    whole = [run.values[block][there] for run in (first, second)]

    def without(run: SampleValues, task: str) -> Floats:
        of_samples = run.of_samples[block][there]  # type: ignore[index]
        return without_each(run.values[block][there], of_samples, getattr(run.samples, task)).T

    for task in ("a", "b"):
        if paired:
            yield spearman(without(first, task), without(second, task))
        else:
            yield spearman(*np.broadcast_arrays(without(first, task), whole[1]))
            yield spearman(*np.broadcast_arrays(whole[0], without(second, task)))


def _over_samples(value: float, groups: list[Floats], confidence: float) -> tuple[float, float]:
    if min(map(len, groups)) < 2:
        return np.nan, np.nan
    moved = [np.arcsin(np.clip(of_group, -1, 1)) for of_group in groups]
    variances = [(len(z) - 1) / len(z) * ((z - z.mean()) ** 2).sum() for z in moved]
    total = sum(variances)
    if not total > 0:
        return (value, value) if total == 0 else (np.nan, np.nan)
    freedom = total**2 / sum(v**2 / (len(z) - 1) for v, z in zip(variances, moved, strict=True))
    width = student.ppf(0.5 + confidence / 2, freedom) * np.sqrt(total)
    ends = np.sin(np.clip(np.arcsin(np.clip(value, -1, 1)) + np.array([-width, width]), -np.pi / 2, np.pi / 2))
    return float(ends[0]), float(ends[1])


def _over_heads(one: Floats, other: Floats, confidence: float, seed: int) -> tuple[float, float]:
    """Heads are drawn with their ranks among all heads: ranked again, they would be nearly the same."""
    ranks = [rankdata(values) for values in (one, other)]
    places = np.random.default_rng(seed).integers(len(one), size=(_RESAMPLES, len(one)))
    drawn = _pearson(*(of_run[places] for of_run in ranks))
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
