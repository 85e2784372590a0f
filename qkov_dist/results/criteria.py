"""By what heads can be ranked, most harmful first, and which of them are significant on the harmful side.

by                          value                                     q                harmful side
change_sgd, change_adam     first-order change of the other's loss    of the change    above 0: conflict
harm                        step * change + step^2 * curvature along  none
curvature                   second-order rise of the harmed's loss    none
interference                mean score                                of cross_mean    above its null
overlap                     overlap of the two tasks                  of overlap       above its null: contested
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError, choose, wrong_argument
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .effects import Effects, Harm, no_influences_known
from .influences import TASKS

Floats = npt.NDArray[np.float64]
CHANGES = {"change_adam": "adam", "change_sgd": "sgd"}
CRITERIA = ("harm", *CHANGES, "curvature", "interference", "overlap")
_WITH_OPTIMIZER = ("harm", "curvature")


@dataclass(frozen=True)
class Criterion:
    """By what heads are ranked, as a caller says it; refused where the parts do not go together.

    Args:
        by: One of ``CRITERIA``.
        harms: For harm and curvature: whose loss is looked at, ``a`` or ``b`` in either case. A change is that of both.
        optimizer: ``sgd`` or ``adam``, for harm and curvature; None is ``adam``.
        step: Learning rate times number of steps, for harm.

    Raises:
        QkovError: for an unknown name, a missing step, and an argument that means nothing for this ``by``.
    """

    by: str
    harms: str = "a"
    optimizer: str | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        choose("by", self.by, CRITERIA)
        object.__setattr__(self, "harms", str(self.harms).lower())
        choose("harms", self.harms, TASKS)
        if self.by in _WITH_OPTIMIZER:
            object.__setattr__(self, "optimizer", self.optimizer or "adam")
            choose("optimizer", str(self.optimizer), OPTIMIZERS)
        elif self.optimizer is not None:
            raise wrong_argument("optimizer", f"one for {' and '.join(_WITH_OPTIMIZER)} alone", repr(self.optimizer))
        if (self.step is None) == (self.by == "harm"):
            expected = "learning rate times number of steps" if self.by == "harm" else "one for harm alone"
            raise wrong_argument("step", expected, self.step)

    @property
    def settings(self) -> dict[str, Any]:
        """What it is besides ``by``, as JSON values, as far as it matters."""
        if self.by not in _WITH_OPTIMIZER:
            return {}
        found: dict[str, Any] = {"harms": self.harms.upper(), "optimizer": self.optimizer}
        return found if self.step is None else {**found, "step": float(self.step)}


@dataclass(frozen=True)
class Judged:
    """One block by one criterion; arrays are [layer, native head].

    Attributes:
        values: What heads are ranked by; NaN for absent heads.
        q_values: Their q, None where there is no test.
        harmful: Whether a head lies on the harmful side.
    """

    values: Floats
    q_values: Floats | None = None
    harmful: npt.NDArray[np.bool_] | None = None


def judged(
    criterion: Criterion,
    *,
    effects: Effects | None,
    harm: Callable[[float, str, str], Harm],
    mean: Mapping[str, npt.NDArray[np.floating[Any]]],
    statistics: Mapping[str, Any],
    score: str,
) -> dict[str, Judged]:
    """Every block of a heatmap by a criterion; the arguments are what a heatmap has of each.

    Raises:
        QkovError: where the heatmap lacks what the criterion asks for.
    """
    by = criterion.by
    if by in ("overlap", "interference"):
        return {block: _tested(by, block, of.astype(np.float64), statistics, score) for block, of in mean.items()}
    if by == "harm":
        found = harm(criterion.step or 0.0, str(criterion.optimizer), criterion.harms)
        return {block: Judged(found.value[block]) for block in mean}
    if effects is None:
        raise no_influences_known()
    if by == "curvature":
        name = f"curvature_{criterion.harms}"
        return {block: Judged(effects[block][str(criterion.optimizer)][name]) for block in mean}
    changes = {block: effects[block][CHANGES[by]] for block in mean}
    return {block: Judged(of["change"], of["q_value"], of["change"] > 0) for block, of in changes.items()}


def _tested(by: str, block: str, mean: Floats, statistics: Mapping[str, Any], score: str) -> Judged:
    """A block by its scores: their mean, or their overlap, with the test of it where there is one."""
    if by == "interference" and score != by:
        remedy = "Run with metric.score=interference, or choose another criterion."
        raise QkovError("by interference", expected="scores of interference", got=score, remedy=remedy)
    tests = statistics.get("overlap" if by == "overlap" else "cross_mean", {}).get(block)
    if tests is None:
        if by == "overlap":
            remedy = "Run with statistics.enabled=true and a score that is never negative, or choose another criterion."
            raise QkovError("by overlap", expected="a test of overlap", got="none in this heatmap", remedy=remedy)
        return Judged(mean)
    harmful = np.nan_to_num(tests.get("effect_size", np.zeros(mean.shape))) > 0
    return Judged(tests["statistic"] if by == "overlap" else mean, tests["q_value"], harmful)
