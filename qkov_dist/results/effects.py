"""Effects of steps: by head, of the whole of attention, and the harm of a step of a given size.

A step's size s is learning rate times number of steps. Its harm to a task is

    s * change + s^2 * curvature,

far from the task's optimum by the first order, near it by the second; they are equal at s = |change| / curvature. The
curvature is that along the step, by the whole Fisher (``influences.curvatures_along``): by its diagonal alone
(``curvature_a``, which adds up over heads) it came out some thousand times too small where it was measured. The total
is that of the summed influences, with an error of its own. Errors are those of the first order; how far other samples
would move a curvature is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qkov_dist.data.copies import in_one_task
from qkov_dist.errors import QkovError, choose, wrong_argument
from qkov_dist.scoring.influence_records import OPTIMIZERS, of_samples, sums_of

from .influences import TASKS, Floats, Samples, changes, curvatures_along, summed, without_self_pairs

ByBlock = Mapping[str, Floats]
Effects = Mapping[str, Mapping[str, Mapping[str, Floats]]]  # block -> optimizer -> name -> [layer, native head]
UNTESTED_KEYS = ("curvature_a", "curvature_b", "curvature_along_a", "curvature_along_b", "own_a", "own_b")
TESTED_KEYS = ("change", "standard_error", "ci_low", "ci_high", "p_value", "q_value", "p_max")
EFFECT_KEYS = (*TESTED_KEYS, *UNTESTED_KEYS)


@dataclass(frozen=True)
class Total:
    """What a set of heads adds up to, for one optimizer.

    Attributes:
        change: First-order change of either task's loss for a unit step on the other.
        standard_error: Of it.
        interval: 95% t interval of it.
        curvature: Second-order rise of each task's loss (``a``, ``b``) for a squared unit step on the other, by the
            diagonal of the Fisher: the sum over heads.
        curvature_along: The same by the whole of the Fisher, terms between heads included: no sum over heads.
        own: First-order change of each task's loss for a unit step on itself, without self-pairs.
        p_value: Two-sided, of the change against 0; NaN where nobody said.
    """

    change: float
    standard_error: float
    interval: tuple[float, float]
    curvature: Mapping[str, float]
    curvature_along: Mapping[str, float]
    own: Mapping[str, float]
    p_value: float = np.nan


@dataclass(frozen=True)
class Harm:
    """The harm of one step to one task, by head; every array is [layer, native head], NaN for absent heads.

    Attributes:
        step: Learning rate times number of steps.
        optimizer: ``sgd`` or ``adam``.
        harmed: ``a`` or ``b``: whose loss is looked at; the step is on the other.
        value: Block -> predicted change of the loss by the step in this head alone; above 0 is harm.
        standard_error: Block -> standard error of its first-order part.
        ci_low: Block -> lower end of its 95% interval, by that error.
        ci_high: Block -> upper end.
        first: Block -> the first-order part.
        second: Block -> the second-order part.
        overtakes: Block -> the step from which on the second order is the larger.
        total: The same of all heads together: value, standard_error, ci_low, ci_high, first, second, overtakes.
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
    counts = in_one_task((contents_a, contents_b))
    return Samples(is_a & counts, ~is_a & counts)


def untested_effects(records: Floats, samples: Samples) -> dict[str, dict[str, Floats]]:
    """Optimizer -> ``UNTESTED_KEYS`` [layer, head], from records [layer, head, optimizer, sums and N]."""
    found: dict[str, dict[str, Floats]] = {}
    for place, optimizer in enumerate(OPTIMIZERS):
        found[optimizer] = {}
        influences = of_samples(records)[..., place, :]
        for task, chosen in zip(TASKS, (samples.a, samples.b), strict=True):
            curvature, own, norm = (
                sums_of(records, f"{name}_{task}")[..., place] for name in ("curvature", "own", "norm")
            )
            found[optimizer] |= {
                f"curvature_{task}": curvature,
                f"curvature_along_{task}": curvatures_along(influences, chosen),
                f"own_{task}": without_self_pairs(own, norm, int(chosen.sum())),
            }
    return found


def total_of(influences: ByBlock, effects: Effects, samples: Samples, optimizer: str) -> Total:
    """What heads add up to.

    Args:
        influences: Block -> [layer, head, optimizer, N].
        effects: Of the same heads.
        samples: Which samples count.
        optimizer: ``sgd`` or ``adam``.
    """
    together = summed(influences)[OPTIMIZERS.index(optimizer)]
    change = changes(together, samples)
    low, high = change.interval()
    along = {task: float(curvatures_along(together, getattr(samples, task))) for task in TASKS}
    curvature, own = (
        {task: float(summed({b: effects[b][optimizer][f"{name}_{task}"] for b in influences})) for task in TASKS}
        for name in ("curvature", "own")
    )
    interval, p_value = (float(low), float(high)), float(change.p_value())
    return Total(float(change.value), float(change.standard_error), interval, curvature, along, own, p_value)


def harm_of(influences: ByBlock, samples: Samples, step: float, optimizer: str, harms: str) -> Harm:
    """The harm of a step, by head.

    Args:
        influences: Block -> [layer, head, optimizer, N].
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
    place = OPTIMIZERS.index(optimizer)
    parts = {block: _parts(step, of_block[:, :, place], samples, harmed) for block, of_block in influences.items()}
    of_all = _parts(step, summed(influences)[place], samples, harmed)
    return Harm(
        step,
        optimizer,
        harmed,
        **{name: {block: part[name] for block, part in parts.items()} for name in of_all},
        total={name: float(value) for name, value in of_all.items()},
    )


def _parts(step: float, influences: Floats, samples: Samples, harmed: str) -> dict[str, Floats]:
    """Everything that ``Harm`` says, from influences [..., N] of heads, or of all heads together."""
    change, curvature = changes(influences, samples), curvatures_along(influences, getattr(samples, harmed))
    first, second = step * change.value, step**2 * curvature
    low, high = change.interval()
    with np.errstate(divide="ignore", invalid="ignore"):
        overtakes = np.abs(change.value) / curvature
    return {
        "value": first + second,
        "standard_error": step * change.standard_error,
        "ci_low": step * low + second,
        "ci_high": step * high + second,
        "first": first,
        "second": second,
        "overtakes": overtakes,
    }


def no_influences_known() -> QkovError:
    """That a heatmap does not know what steps do."""
    return QkovError(
        "heatmap.effects",
        expected="what each sample has to do with the effect of a step",
        got="none: the file was written before effects were",
        remedy="Run again; every run computes them.",
    )
