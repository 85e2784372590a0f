"""What the answer in words is made of, and the step at which it is told.

A *practical step* on a task is the one that lowers its own loss by a tenth to first order. All numbers of a sentence
are those of one such step: a unit step (learning rate x number of steps = 1) is one that nobody takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .effects import Total
from .influences import TASKS, Floats, Samples

Direction = Literal["harm", "help", "unknown"]
BY, BESIDE = "adam", "sgd"
CHANGE = f"change_{BY}"
PART = 0.1  # of its own loss that a practical step on a task takes away
UNITS = {"mean": "nats per labelled token", "sum": "nats per sample"}  # by metric.loss_reduction


@dataclass(frozen=True)
class Facts:
    """What the words are made of; arrays are over all present heads of all blocks.

    Attributes:
        tasks: Names of A and B.
        num_samples: Of A and of B, those that effects are of.
        losses: Mean loss of these samples by task, ``a`` and ``b``; NaN where the file does not know.
        unit: Of losses.
        level: At or below which q a head is significant.
        totals: Optimizer -> what all heads add up to.
        names: Of heads, as ``Q 14.2``: block, layer, head.
        changes: Optimizer -> change by head.
        q_values: Optimizer -> q of the change by head.
        folder: Where the run lies, as commands name it.
        pair: The two tasks, where the run had more.
        places: Where both are among the run's tasks.
        are_scaled: Whether each sample's gradient was divided by its norm, so that no number is a change of mean loss.
    """

    tasks: tuple[str, str]
    num_samples: tuple[int, int]
    losses: Mapping[str, float]
    unit: str
    level: float
    totals: Mapping[str, Total]
    names: Sequence[str]
    changes: Mapping[str, Floats]
    q_values: Mapping[str, Floats]
    folder: str
    pair: tuple[str, str] | None = None
    places: tuple[int, int] = (0, 1)
    are_scaled: bool = False

    def significant(self, sign: int) -> list[str]:
        """The heads in conflict (1) or in synergy (-1), those of the largest change first."""
        change = self.changes[BY]
        found = np.flatnonzero((np.sign(change) == sign) & (self.q_values[BY] <= self.level))
        return [self.names[int(place)] for place in sorted(found, key=lambda place: -abs(change[place]))]

    @property
    def samples(self) -> str:
        """How many there are, as ``24 + 24``."""
        return " + ".join(map(str, self.num_samples))

    def name_of(self, task: str) -> str:
        """The name of ``a`` or ``b``."""
        return self.tasks[TASKS.index(task)]

    def practical_step(self, stepped: str = "b", optimizer: str = BY) -> float:
        """The step on a task that lowers its own loss by ``PART`` of it, to first order; NaN where there is none."""
        own, loss = self.totals[optimizer].own[stepped], self.losses[stepped]
        has_step = not self.are_scaled and own < 0 and loss > 0 and math.isfinite(loss)
        return PART * loss / -own if has_step else math.nan

    def why_no_step(self, stepped: str = "b", optimizer: str = BY) -> str:
        """Why there is no practical step, as a clause."""
        if self.are_scaled:
            return "gradients were divided by their norms (sample_scale: unit), so that numbers are of scaled losses"
        name, own = self.name_of(stepped), self.totals[optimizer].own[stepped]
        if math.isnan(own):
            return (
                f"{name} has fewer than two samples of its own, so what a step on it does to its own loss is not known"
            )
        if own >= 0:
            return f"by these samples a step on {name} does not lower its own loss"
        return f"the file does not hold {name}'s losses"


def direction_of(total: Total) -> Direction:
    """Harm or help where the interval of the total does not contain 0."""
    low, high = total.interval
    return "harm" if low > 0 else "help" if high < 0 else "unknown"


def mean_losses(losses_a: Floats, losses_b: Floats, samples: Samples) -> dict[str, float]:
    """Mean loss by task over the samples that count, NaN where there are none."""
    losses = np.concatenate([losses_a, losses_b])
    return {
        task: float(losses[mask].mean()) if mask.any() else math.nan
        for task, mask in zip(TASKS, (samples.a, samples.b), strict=True)
    }


def number(value: float) -> str:
    """Two significant digits, three from 100 on."""
    if not math.isfinite(value):
        return "not known"
    if 100 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.0f}"
    mantissa, e, exponent = f"{value:#.2g}".partition("e")  # with trailing zeros: 0.10
    return f"{mantissa}e{int(exponent)}" if e else mantissa.rstrip(".")


def bracket(low: float, high: float) -> str:
    """An interval."""
    return f"[{number(low)}, {number(high)}]"
