"""Effects of steps, from influences: those of the whole of attention, and the harm of a step of a given size.

A step's size s is learning rate times number of steps. Its harm to a task is

    s * change + s^2 * curvature,

far from the task's optimum by the first order, near it by the second; they are equal at s = |change| / curvature.
Heads, blocks and layers add up: the total is that of the summed influences, with an error of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qkov_dist.errors import QkovError, choose, wrong_argument

from .influences import OPTIMIZERS, TASKS, Floats, Samples, changes, curvatures, harm, own_changes, summed

ByBlock = Mapping[str, Floats]
EFFECT_KEYS = (
    "change",
    "standard_error",
    "ci_low",
    "ci_high",
    "p_value",
    "q_value",
    "p_max",
    "curvature_a",
    "curvature_a_error",
    "curvature_b",
    "curvature_b_error",
    "own_a",
    "own_b",
)


@dataclass(frozen=True)
class Total:
    """What a set of heads adds up to, for one optimizer.

    Attributes:
        change: First-order change of either task's loss for a unit step on the other.
        standard_error: Of it.
        interval: 95% t interval of it.
        curvature: Second-order rise of each task's loss for a squared unit step on the other, by ``a`` and ``b``.
        own: First-order change of each task's loss for a unit step on itself, without self-pairs.
    """

    change: float
    standard_error: float
    interval: tuple[float, float]
    curvature: Mapping[str, float]
    own: Mapping[str, float]


@dataclass(frozen=True)
class Harm:
    """The harm of one step to one task, by head; every array is [layer, native head], NaN for absent heads.

    Attributes:
        step: Learning rate times number of steps.
        optimizer: ``sgd`` or ``adam``.
        harmed: ``a`` or ``b``: whose loss is looked at; the step is on the other.
        value: Block -> predicted change of the loss by the step in this head alone; above 0 is harm.
        standard_error: Block -> its standard error.
        ci_low: Block -> lower end of its 95% interval.
        ci_high: Block -> upper end.
        first: Block -> the first-order part.
        second: Block -> the second-order part.
        overtakes: Block -> the step from which on the second order is the larger.
        total: The same of all heads together: value, standard error, both ends, both parts, that step.
    """

    step: float
    optimizer: str
    harmed: str
    value: ByBlock
    standard_error: ByBlock
    ci_low: ByBlock
    ci_high: ByBlock
    first: ByBlock
    second: ByBlock
    overtakes: ByBlock
    total: Mapping[str, float]

    @property
    def near_optimum(self) -> bool:
        """Whether, for attention as a whole, the second order decides at this step."""
        return self.total["second"] > abs(self.total["first"])


def counted_samples(contents_a: Sequence[str], contents_b: Sequence[str]) -> Samples:
    """Which samples effects are of: those that only one task has, by their contents ("" is unknown, and counts)."""
    is_a = np.arange(len(contents_a) + len(contents_b)) < len(contents_a)
    both = ({*contents_a} & {*contents_b}) - {""}
    counts = np.array([content not in both for content in (*contents_a, *contents_b)])
    return Samples(is_a & counts, ~is_a & counts)


def total_of(influences: ByBlock, samples: Samples, optimizer: str) -> Total:
    """What heads add up to, from block -> influences [layer, head, optimizer, column, N]."""
    together = summed(influences)
    change = changes(together, samples, optimizer)
    low, high = change.interval()
    return Total(
        float(change.value),
        float(change.standard_error),
        (float(low), float(high)),
        {task: float(curvatures(together, samples, optimizer, task).value) for task in TASKS},
        {task: float(own_changes(together, samples, optimizer, task)) for task in TASKS},
    )


def harm_of(influences: ByBlock, samples: Samples, step: float, optimizer: str, harms: str) -> Harm:
    """The harm of a step, by head.

    Args:
        influences: Block -> [layer, head, optimizer, column, N].
        samples: Which samples count.
        step: Learning rate times number of steps, above 0.
        optimizer: ``sgd`` or ``adam``.
        harms: The task that is harmed, ``a`` or ``b``, in either case.

    Raises:
        QkovError: for a step that is not above 0, or another optimizer or task.
    """
    choose("optimizer", optimizer, OPTIMIZERS)
    harmed = str(harms).lower()
    choose("harms", harmed, TASKS)
    if not (np.isfinite(step) and step > 0):
        raise wrong_argument("step", "a finite number above 0 (learning rate times number of steps)", step)
    together = summed(influences)
    of_all = harm(together, samples, optimizer, harmed, step)
    found = {block: harm(of_block, samples, optimizer, harmed, step) for block, of_block in influences.items()}
    ends = {block: estimate.interval() for block, estimate in found.items()}
    parts = {
        block: _parts(of_block, samples, optimizer, harmed, step)
        for block, of_block in {**influences, "": together}.items()
    }
    first, second, overtakes = ({block: part[place] for block, part in parts.items()} for place in range(3))
    total = {"value": of_all.value, "standard_error": of_all.standard_error}
    total |= dict(zip(("ci_low", "ci_high"), of_all.interval(), strict=True))
    total |= {"first": first.pop(""), "second": second.pop(""), "overtakes": overtakes.pop("")}
    return Harm(
        step,
        optimizer,
        harmed,
        {block: estimate.value for block, estimate in found.items()},
        {block: estimate.standard_error for block, estimate in found.items()},
        {block: low for block, (low, _) in ends.items()},
        {block: high for block, (_, high) in ends.items()},
        first,
        second,
        overtakes,
        {name: float(value) for name, value in total.items()},
    )


def _parts(
    influences: Floats, samples: Samples, optimizer: str, harmed: str, step: float
) -> tuple[Floats, Floats, Floats]:
    """First and second order of a step, and the step at which they are equal."""
    change = changes(influences, samples, optimizer).value
    curvature = curvatures(influences, samples, optimizer, harmed).value
    with np.errstate(divide="ignore", invalid="ignore"):
        return step * change, step**2 * curvature, np.abs(change) / curvature


def no_influences() -> QkovError:
    """That a heatmap does not know what steps do."""
    return QkovError(
        "heatmap.effects",
        expected="what each sample has to do with the effect of a step",
        got="none: the file was written before effects were",
        remedy="Run again; every run computes them.",
    )
