r"""What single samples have to do with the effect of a step, and what follows from it: changes, curvatures, errors.

For one head, sample n of task s, and the other task t, with gbar the mean gradient of a task, F the mean of its squared
gradients, P = 1 (``sgd``) or R^(-1/2) (``adam``), and a step being W <- W - step * P gbar:

    column            of sample n                        its mean over the samples of s
    change            - sum_p g_n P gbar_t               change of either task's loss by a unit step on the other
    own               - sum_p g_n P gbar_s               change of s's own loss by a unit step on itself, self-pairs in
    curvature         1/2 sum_p g_n^2 (P gbar_t)^2       rise of s's loss for a squared unit step on t
    step_curvature    sum_p F_t P^2 gbar_s g_n           twice the rise of t's loss for a squared unit step on s
    norm              sum_p g_n^2 P                      what a self-pair adds to ``own``

All columns add up over elements, tiles, ranks, heads, blocks and layers, so that the effect of any set of heads is that
of the sum of their influences. A change is the mean over all pairs (i, j); the delete-one jackknife of such a
two-sample U-statistic is that of the two means of influences, exactly:

    variance = var_A / n_A + var_B / n_B,  with Welch's degrees of freedom.

Those of a curvature, and of the harm s * change + s^2 * curvature of a step s, are of the same form, by the
infinitesimal jackknife (a curvature is quadratic in the step's mean gradient). R is taken as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

OPTIMIZERS = ("sgd", "adam")
COLUMNS = ("change", "own", "curvature", "step_curvature", "norm")
TASKS = ("a", "b")


@dataclass(frozen=True)
class Estimate:
    """Numbers with their uncertainty; arrays of one shape.

    Attributes:
        value: The estimate.
        standard_error: Of it; NaN where a task has fewer than two samples.
        freedom: Welch's degrees of freedom.
    """

    value: Floats
    standard_error: Floats
    freedom: Floats

    def interval(self, confidence: float = 0.95) -> tuple[Floats, Floats]:
        """Both ends of the t interval."""
        from scipy.stats import t as student  # takes its time to load, which who only reads a file should not wait for

        width = student.ppf(0.5 + confidence / 2, self.freedom) * self.standard_error
        return self.value - width, self.value + width


@dataclass(frozen=True)
class Samples:
    """Which of the samples of an influence array count: bool [N] each, A's and B's.

    Samples that both tasks have count in neither: they are no pair of different samples.
    """

    a: Mask
    b: Mask

    def of(self, task: str) -> Mask:
        """Those of ``a`` or ``b``."""
        return self.a if task == "a" else self.b

    @property
    def sizes(self) -> tuple[int, int]:
        """How many of each."""
        return int(self.a.sum()), int(self.b.sum())


def column(influences: Floats, optimizer: str, name: str) -> Floats:
    """One column [..., N] of influences [..., optimizer, column, N], as a view."""
    return influences[..., OPTIMIZERS.index(optimizer), COLUMNS.index(name), :]


def changes(influences: Floats, samples: Samples, optimizer: str) -> Estimate:
    """First-order change of either task's mean loss for a unit step on the other."""
    of_samples = column(influences, optimizer, "change")
    return _estimate(of_samples[..., samples.a], of_samples[..., samples.b])


def curvatures(influences: Floats, samples: Samples, optimizer: str, harmed: str) -> Estimate:
    """Second-order rise of one task's mean loss for a squared unit step on the other."""
    return harm(influences, samples, optimizer, harmed, 1.0, first_order=False)


def own_changes(influences: Floats, samples: Samples, optimizer: str, task: str) -> Floats:
    """First-order change of a task's mean loss for a unit step on itself, without self-pairs; below 0 where it helps."""
    chosen = samples.of(task)
    num = int(chosen.sum())
    if num < 2:
        return np.full(influences.shape[:-3], np.nan)
    own, norm = (column(influences, optimizer, name)[..., chosen].mean(-1) for name in ("own", "norm"))
    freed: Floats = (num * own + norm) / (num - 1)
    return freed


def harm(
    influences: Floats,
    samples: Samples,
    optimizer: str,
    harmed: str,
    step: float,
    *,
    first_order: bool = True,
) -> Estimate:
    """Step * change + step^2 * curvature of one task's mean loss, by a step on the other.

    Args:
        influences: [..., optimizer, column, N].
        samples: Which of them count.
        optimizer: ``sgd`` or ``adam``.
        harmed: The task whose loss is looked at, ``a`` or ``b``; the step is on the other.
        step: Learning rate times number of steps.
        first_order: False leaves out the first term.
    """
    change, second, of_step = (
        column(influences, optimizer, name) for name in ("change", "curvature", "step_curvature")
    )
    first = step if first_order else 0.0
    stepped = samples.of("b" if harmed == "a" else "a")
    of_harmed = (first * change + step**2 * second)[..., samples.of(harmed)]
    of_stepped = (first * change + step**2 * of_step)[..., stepped]
    found = _estimate(of_harmed, of_stepped)
    return Estimate(_mean(of_harmed), found.standard_error, found.freedom)


def _estimate(one: Floats, other: Floats) -> Estimate:
    """The mean of ``one`` [..., n], whose error is that of both groups' means."""
    sizes = one.shape[-1], other.shape[-1]
    value = _mean(one)
    if min(sizes) < 2:
        nothing = np.full(value.shape, np.nan)
        return Estimate(value if min(sizes) else nothing, nothing, nothing)
    variances = [part.var(-1, ddof=1) / num for part, num in zip((one, other), sizes, strict=True)]
    total = variances[0] + variances[1]
    spread = sum(variance**2 / (num - 1) for variance, num in zip(variances, sizes, strict=True))
    freedom = np.divide(total**2, spread, out=np.where(np.isnan(total), np.nan, 1.0), where=spread > 0)
    return Estimate(value, np.sqrt(total), freedom)


def _mean(values: Floats) -> Floats:
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    mean: Floats = values.mean(-1)
    return mean


def summed(influences: Mapping[str, Floats]) -> Floats:
    """Influences of all heads together, [optimizer, column, N], from block -> [layer, head, optimizer, column, N]."""
    total: Floats = np.sum([np.nansum(of_block, axis=(0, 1)) for of_block in influences.values()], axis=0)
    return total
