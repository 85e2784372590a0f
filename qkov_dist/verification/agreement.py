"""How well each predictor ranks heads, and how far its size is right, against what was measured.

Ranks are compared over all heads, and within each block (then averaged), since scores of different blocks are not on
one scale. A slope is that of the line through the origin that fits measured to predicted best, sum(m p) / sum(p^2):
1 where predictions are right in size. Intervals resample heads, within their block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from qkov_dist.results.influences import Floats

from .effects import HeadEffect

Draws = Sequence[npt.NDArray[np.intp]]
Interval = tuple[float, float]
SCORES = ("interference", "overlap", "||gA|| ||gB||")
PREDICTORS: Mapping[str, tuple[str, ...]] = {
    "change": ("change", "harm", "curvature", "-signed", *SCORES),
    "odd": ("change", "-signed", *SCORES),
    "even": ("curvature", "curvature_along", *SCORES),
}  # of what is measured; the first one is the baseline
SLOPES = (
    ("odd", "change", 1),
    ("even", "curvature", 2),
    ("even", "curvature_along", 2),
    ("change", "harm", 1),
)  # what is measured, what is predicted for a unit step, the power of the size that it goes with


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of one predictor with what was measured.

    Attributes:
        size: eta.
        samples: On which of A's samples: ``held out`` or ``same``.
        measured: ``change`` (above 0 is harm), or its ``odd`` or ``even`` part.
        predictor: Which number.
        rho: Spearman's rank correlation over all heads.
        interval: Its 95% bootstrap interval.
        within: Mean of the blocks' own correlations.
        within_interval: Its 95% bootstrap interval.
        gain: ``within`` minus that of the first predictor; 0 for that one.
        gain_interval: Its 95% bootstrap interval, over the same resamples.
    """

    size: float
    samples: str
    measured: str
    predictor: str
    rho: float
    interval: Interval
    within: float
    within_interval: Interval
    gain: float
    gain_interval: Interval


@dataclass(frozen=True)
class Slope:
    """Measured against predicted, in size.

    Attributes:
        size: eta.
        samples: On which of A's samples.
        measured: ``odd``, ``even`` or ``change``.
        predictor: What is to be equal to it: eta change, eta^2 curvature (or curvature_along), or eta harm.
        slope: Of the line through the origin.
        interval: Its 95% bootstrap interval.
    """

    size: float
    samples: str
    measured: str
    predictor: str
    slope: float
    interval: Interval


def agreements(
    effects: Sequence[HeadEffect], sizes: Sequence[float], *, resamples: int, seed: int
) -> tuple[list[Agreement], list[Slope]]:
    """Rank correlations of every predictor, and slopes, for every size, on both halves of A's samples."""
    blocks = np.array([effect.target.block for effect in effects])
    members = [np.flatnonzero(blocks == block) for block in dict.fromkeys(blocks.tolist())]
    draws = [np.arange(len(effects)), *_resamples(members, resamples, seed)]
    ranks, slopes = [], []
    for place, size in enumerate(sizes):
        for samples in effects[0].measured:
            for measured, names in PREDICTORS.items():
                values = _measured(effects, samples, measured, place)
                columns = np.column_stack([_predicted(effects, name, size) for name in names])
                numbers = _ranked(columns, values, blocks, draws)
                ranks += [
                    Agreement(size, samples, measured, name, *row) for name, row in zip(names, numbers, strict=True)
                ]
            for measured, predictor, power in SLOPES:
                values, predicted = _measured(effects, samples, measured, place), _predicted(effects, predictor, size)
                found = [_slope(size**power * predicted[drawn], values[drawn]) for drawn in draws]
                slopes.append(Slope(size, samples, measured, predictor, *_with_interval(np.array(found))))
    return ranks, slopes


def _measured(effects: Sequence[HeadEffect], samples: str, part: str, place: int) -> Floats:
    parts = [effect.measured[samples] for effect in effects]
    odd, even = (np.array([getattr(of_head, name)[place] for of_head in parts]) for name in ("odd", "even"))
    found: Floats = {"odd": odd, "even": even, "change": odd + even}[part]
    return found


def _predicted(effects: Sequence[HeadEffect], name: str, size: float) -> Floats:
    """A predictor; ``harm`` as change a unit of the size, change + size * curvature along the step."""
    if name == "harm":
        return _predicted(effects, "change", size) + size * _predicted(effects, "curvature_along", size)
    return np.array([effect.predicted[name] for effect in effects])


def _ranked(
    columns: Floats, values: Floats, blocks: npt.NDArray[np.str_], draws: Draws
) -> Iterator[tuple[float, Interval, float, Interval, float, Interval]]:
    """Rank correlations of each predictor [heads, P], and what it gains over the first."""
    overall = np.array([_rhos(columns[drawn], values[drawn]) for drawn in draws])
    within = np.array([_within(columns, values, blocks, drawn) for drawn in draws])
    gain = within - within[:, :1]
    for at in range(columns.shape[1]):
        yield (*_with_interval(overall[:, at]), *_with_interval(within[:, at]), *_with_interval(gain[:, at]))


def _resamples(members: Draws, count: int, seed: int) -> Iterator[npt.NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.concatenate([rng.choice(of_block, len(of_block)) for of_block in members])


def _slope(predicted: Floats, measured: Floats) -> float:
    """Of measured on predicted, through the origin; NaN where nothing is predicted."""
    square = float(predicted @ predicted)
    return float(predicted @ measured) / square if square > 0 else float("nan")


def _rhos(columns: Floats, values: Floats) -> Floats:
    """Spearman's rank correlation of each column [heads, P] with values [heads]; NaN where one side is constant."""
    ranks = rankdata(np.column_stack([columns, values]), axis=0)
    ranks -= ranks.mean(axis=0)
    norms = np.linalg.norm(ranks, axis=0)
    scale = norms[:-1] * norms[-1]
    rhos: Floats = np.divide(ranks[:, :-1].T @ ranks[:, -1], scale, out=np.full(len(scale), np.nan), where=scale > 0)
    return rhos


def _within(columns: Floats, values: Floats, blocks: npt.NDArray[np.str_], drawn: npt.NDArray[np.intp]) -> Floats:
    """Mean over blocks of the correlations inside a block, [P]."""
    of_block = [drawn[blocks[drawn] == block] for block in np.unique(blocks)]
    found: Floats = np.mean([_rhos(columns[heads], values[heads]) for heads in of_block], axis=0)
    return found


def _with_interval(drawn: Floats) -> tuple[float, Interval]:
    """The observed value (the first) and the middle 95% of the resampled ones."""
    if len(drawn) < 2 or np.isnan(drawn[1:]).all():
        return float(drawn[0]), (float("nan"), float("nan"))
    low, high = np.nanquantile(drawn[1:], (0.025, 0.975))
    return float(drawn[0]), (float(low), float(high))
