r"""What single samples have to do with the effect of a step, and what follows from it: changes and their errors.

A step on task t is W <- W - step * P gbar_t, with gbar_t its mean gradient and P = 1 (``sgd``) or R^(-1/2) (``adam``).
The influence of sample n is - sum_p g_n P gbar_t, with t the task that n is not of. Influences add up over elements,
tiles, ranks, heads, blocks and layers, so that the change by any set of heads is that of the sum of their influences.

The change of either task's loss by a unit step on the other is the mean of the influences of either task. It is the
mean over all pairs (i, j), and the delete-one jackknife of such a two-sample U-statistic is that of two means:

    variance = var_A / n_A + var_B / n_B,  with Welch's degrees of freedom.

R is taken as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

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
        from scipy.stats import t as student  # reading a file does without it

        width = student.ppf(0.5 + confidence / 2, self.freedom) * self.standard_error
        return self.value - width, self.value + width

    def z(self) -> Floats:
        """The value in standard errors; 0 where nothing varies, NaN where nothing is known."""
        error = self.standard_error
        z: Floats = np.divide(self.value, error, out=np.where(np.isnan(error), np.nan, 0.0), where=error > 0)
        return z

    def p_value(self) -> Floats:
        """Two-sided, of Student's t against 0; 1 where nothing varies, NaN where nothing is known."""
        from scipy.stats import t as student

        z = self.z()
        p: Floats = np.where(np.isnan(z), np.nan, 2 * student.sf(np.abs(z), self.freedom))
        return p


@dataclass(frozen=True)
class Samples:
    """Which of the samples of an influence array count: bool [N] each, A's and B's.

    Samples that both tasks have count in neither: they are no pair of different samples.
    """

    a: Mask
    b: Mask

    @property
    def sizes(self) -> tuple[int, int]:
        """How many of each."""
        return int(self.a.sum()), int(self.b.sum())


def changes(influences: Floats, samples: Samples) -> Estimate:
    """First-order change of either task's mean loss for a unit step on the other, from influences [..., N]."""
    parts = influences[..., samples.a], influences[..., samples.b]
    value = _mean(parts[0])
    if min(samples.sizes) < 2:
        nothing = np.full(value.shape, np.nan)
        return Estimate(value if min(samples.sizes) else nothing, nothing, nothing)
    variances = [part.var(-1, ddof=1) / num for part, num in zip(parts, samples.sizes, strict=True)]
    total = variances[0] + variances[1]
    spread = sum(variance**2 / (num - 1) for variance, num in zip(variances, samples.sizes, strict=True))
    freedom = np.divide(total**2, spread, out=np.where(np.isnan(total), np.nan, 1.0), where=spread > 0)
    return Estimate(value, np.sqrt(total), freedom)


def curvatures_along(influences: Floats, harmed: Mask) -> Floats:
    """Second-order rise of a task's mean loss for a squared unit step on the other: 1/2 mean_n influence_n^2.

    It is 1/2 u' F u of the step u = P gbar with the whole empirical Fisher F of the task, in place of the Hessian: with
    all terms between elements, and, of summed influences, between heads, which the Fisher's diagonal leaves out.

    Args:
        influences: [..., N].
        harmed: The task's samples, bool [N].
    """
    return 0.5 * _mean(influences[..., harmed] ** 2)


def without_self_pairs(own: Floats, norm: Floats, num: int) -> Floats:
    """A task's change by a unit step on itself over pairs of different samples.

    Args:
        own: - sum_p gbar P gbar.
        norm: sum_p F P: what a sample with itself adds, on average.
        num: Samples of the task; with fewer than two there is no pair.
    """
    if num < 2:
        return np.full(np.shape(own), np.nan)
    freed: Floats = (num * own + norm) / (num - 1)
    return freed


def _mean(values: Floats) -> Floats:
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    mean: Floats = values.mean(-1)
    return mean


def summed(of_heads: Mapping[str, Floats]) -> Floats:
    """The sum over all layers and heads of all blocks, from block -> [layer, head, ...], NaN for absent heads."""
    total: Floats = np.sum([np.nansum(of_block, axis=(0, 1)) for of_block in of_heads.values()], axis=0)
    return total
