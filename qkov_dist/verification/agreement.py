"""How well each predictor ranks heads, against what was measured.

Ranks are compared over all heads, and within each block (then averaged), since scores of different blocks are not on
one scale. Intervals resample heads, within their block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from .effects import HeadEffect

Floats = npt.NDArray[np.float64]

HARM = ("-signed", "interference", "overlap", "||gA|| ||gB||", "-gA.gB")

SIZE = ("|signed|", "interference", "overlap", "||gA|| ||gB||", "|gA.gB|")

BASELINE = {"change": "-gA.gB", "|change|": "||gA|| ||gB||"}


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of one predictor with the measured change.

    Attributes:
        step: eta.
        measured: ``change`` (signed; above 0 is harm) or ``|change|``.
        predictor: Which number.
        rho: Spearman's rank correlation over all heads.
        interval: Its 95% bootstrap interval.
        within: Mean of the blocks' own correlations.
        within_interval: Its 95% bootstrap interval.
        gain: ``within`` minus that of the plain baseline; 0 for the baseline itself.
        gain_interval: Its 95% bootstrap interval, over the same resamples.
    """

    step: float
    measured: str
    predictor: str
    rho: float
    interval: tuple[float, float]
    within: float
    within_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


def agreements(effects: Sequence[HeadEffect], steps: Sequence[float], *, resamples: int, seed: int) -> list[Agreement]:
    """Rank correlation of every predictor with the measured changes, for every step size."""
    blocks = np.array([effect.target.block for effect in effects])
    members = [np.flatnonzero(blocks == block) for block in dict.fromkeys(blocks.tolist())]
    draws = [np.arange(len(effects)), *_resamples(members, resamples, seed)]
    rows = []
    for place, step in enumerate(steps):
        change = np.array([effect.changes[place] for effect in effects])
        for measured, values, names in (("change", change, HARM), ("|change|", np.abs(change), SIZE)):
            columns = np.array([[effect.predicted[name] for name in names] for effect in effects])
            overall = np.array([_rhos(columns[d], values[d]) for d in draws])
            within = np.array([_within(columns, values, blocks, d) for d in draws])
            gain = within - within[:, [names.index(BASELINE[measured])]]
            for at, name in enumerate(names):
                numbers = (number for drawn in (overall, within, gain) for number in _with_interval(drawn[:, at]))
                rows.append(Agreement(step, measured, name, *numbers))  # type: ignore[arg-type]
    return rows


def _resamples(members: Sequence[npt.NDArray[np.intp]], count: int, seed: int) -> Iterator[npt.NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.concatenate([rng.choice(of_block, len(of_block)) for of_block in members])


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


def _with_interval(drawn: Floats) -> tuple[float, tuple[float, float]]:
    """The observed value (the first) and the middle 95% of the resampled ones."""
    if len(drawn) < 2 or np.isnan(drawn[1:]).all():
        return float(drawn[0]), (float("nan"), float("nan"))
    low, high = np.nanquantile(drawn[1:], (0.025, 0.975))
    return float(drawn[0]), (float(low), float(high))
