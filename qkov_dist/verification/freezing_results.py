r"""What freezing did, over seeds: A's held-out change at equal gain on B.

Within a seed and a share of heads, all trainings are looked at where B has gained as much as the one that gains least
ever does: all are compared at one gain. A seed's choices at random are averaged. Differences are taken within a seed,
and intervals are Student's: over seeds, of the seeds' means; over samples, of each sample's mean over the seeds that
hold it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from qkov_dist.errors import QkovError
from qkov_dist.results.influences import Floats

from .criteria import RANDOM
from .freezing import NONE, Trial, Tried

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A mean and its 95% intervals: over seeds, and over A's samples."""

    value: float
    over_seeds: Interval
    over_samples: Interval


@dataclass(frozen=True)
class Outcome:
    """What one criterion did at one share.

    Attributes:
        criterion: Its name, ``none`` or ``random``.
        share: Of all heads, that was frozen; that of the others in the comparison for ``none``.
        heads: How many that are.
        gain: Mean gain on B at which trainings are compared.
        change: A's held-out change there.
        less_none: The same less that without frozen heads; below 0 freezing spares A.
        less_random: The same less that with heads frozen at random; below 0 the criterion is worth something.
        total_gain: B's gain at the end.
        total_change: A's change at the end.
    """

    criterion: str
    share: float
    heads: int
    gain: float
    change: Difference
    less_none: Difference
    less_random: Difference
    total_gain: float
    total_change: float


def outcomes(trials: Sequence[Trial], num_samples: int) -> list[Outcome]:
    """Every criterion at every share, over seeds.

    Args:
        trials: One for each seed; a seed's shares may be in several, each with a training without frozen heads.
        num_samples: Of A's samples.

    Raises:
        QkovError: where no seed has a gain on B that all trainings reach.
    """
    shares = {tried.share for trial in trials for tried in trial.tried if tried.criterion != NONE}
    return [outcome for share in sorted(shares) for outcome in _at_share(trials, share, num_samples)]


def _at_share(trials: Sequence[Trial], share: float, num_samples: int) -> Iterator[Outcome]:
    tried = [trial for trial in trials if any(one.share == share for one in trial.tried)]
    compared = [trial for trial in tried if common_gain(_runs(trial, share)) > 0]
    if not compared:
        raise QkovError(
            "qkov validate --freeze",
            expected="a gain on B's held-out samples that every training reaches",
            got="none with any seed",
            remedy="Train longer (--steps), at another --learning-rate, or on more --samples.",
        )
    gains = [common_gain(_runs(trial, share)) for trial in compared]
    names = dict.fromkeys(tried.criterion for trial in compared for tried in _runs(trial, share))
    changes = {
        name: np.stack(
            [_change(trial, share, name, gain, num_samples) for trial, gain in zip(compared, gains, strict=True)]
        )
        for name in names
    }
    for name in names:
        runs = [tried for trial in compared for tried in _runs(trial, share) if tried.criterion == name]
        yield Outcome(
            name,
            share,
            len(runs[0].heads),
            float(np.mean(gains)),
            _difference(changes[name]),
            _difference(changes[name] - changes[NONE]),
            _difference(changes[name] - changes[RANDOM]) if RANDOM in names else _difference(changes[name] * np.nan),
            float(np.mean([tried.trajectory.gains[-1] for tried in runs])),
            float(np.mean([(tried.trajectory.a[-1] - tried.trajectory.a[0]).mean() for tried in runs])),
        )


def _runs(trial: Trial, share: float) -> list[Tried]:
    """Trainings of a share, and the one without frozen heads."""
    return [tried for tried in trial.tried if tried.share == share or tried.criterion == NONE]


def common_gain(tried: Sequence[Tried]) -> float:
    """The gain on B that all trainings reach."""
    return min(float(one.trajectory.gains.max()) for one in tried)


def _change(trial: Trial, share: float, criterion: str, gain: float, num_samples: int) -> Floats:
    """Change of each of A's samples at a gain, over one seed's trainings by a criterion; NaN where not held out."""
    found = [one.trajectory.change_at(gain) for one in _runs(trial, share) if one.criterion == criterion]
    change = np.full(num_samples, np.nan)
    change[list(trial.held_out_a)] = np.mean(found, axis=0)
    return change


def _difference(values: Floats) -> Difference:
    """Mean and intervals of values [seeds, samples], NaN where a seed does not hold a sample out."""
    if np.isnan(values).all():
        nothing = (float("nan"), float("nan"))
        return Difference(float("nan"), nothing, nothing)
    of_seeds = np.nanmean(values, axis=1)
    of_samples = np.nanmean(values[:, ~np.isnan(values).all(axis=0)], axis=0)
    return Difference(float(of_seeds.mean()), interval(of_seeds), interval(of_samples))


def interval(values: Floats, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean; NaN of fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    width = student.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - width), float(values.mean() + width)


def spares(rows: Sequence[Outcome]) -> str:
    """What the outcomes at one share say, in words: a difference counts where both of its intervals leave out 0."""
    chosen = [row for row in rows if row.criterion not in (NONE, RANDOM)]
    better = [row.criterion for row in chosen if _below(row.less_random)]
    worse = [row.criterion for row in chosen if _below(_negative(row.less_random))]
    spared = [row.criterion for row in rows if row.criterion != NONE and _below(row.less_none)]
    return (
        f"A changes less (or falls more) than with none frozen: {', '.join(spared) or 'with no choice'}. "
        f"Than with heads frozen at random: {', '.join(better) or 'by no criterion'}"
        + (f"; more: {', '.join(worse)}." if worse else ".")
    )


def _below(difference: Difference) -> bool:
    return difference.over_seeds[1] < 0 and difference.over_samples[1] < 0


def _negative(difference: Difference) -> Difference:
    ends = ((-high, -low) for low, high in (difference.over_seeds, difference.over_samples))
    return Difference(-difference.value, *ends)
