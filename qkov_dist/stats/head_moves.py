r"""Which heads moved between two runs: beyond the errors of both, head by head.

    paired      both runs are of the same samples: the difference of a head's phi (``sample_values``), sample by sample,
                is the phi of the difference, tested as a change is (``effect_tests.mean_tests``): delete-one jackknife,
                Student's t, q within a block, family-wise p over all blocks from random signs. What samples have in
                common in both runs is taken out.
    unpaired    variances add, with Satterthwaite's degrees of freedom; family-wise p by Bonferroni over all blocks.
                Where runs of one model share some of their samples this is conservative.

R is taken as given in each run: that other samples make another R is in no error. A difference that the order of sums
explains (float32 scores of other ranks agree to 1e-5 of a block's largest) is none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from qkov_dist.results.influences import Estimate, Floats

from .effect_tests import mean_tests
from .head_tests import q_values
from .sample_values import SampleValues

MOVE_KEYS = ("difference", "standard_error", "ci_low", "ci_high", "p_value", "q_value", "p_max")
Moves = dict[str, dict[str, Floats]]  # block -> name (MOVE_KEYS) -> [layer, native head]
ROUNDING = 1e-5  # of the block's largest value


def can_be_tested(first: SampleValues, second: SampleValues) -> bool:
    """Whether both runs know errors of this quantity."""
    return all(run.of_samples is not None or run.errors is not None for run in (first, second))


def paired_moves(
    first: SampleValues, second: SampleValues, *, num_draws: int, seed: int = 0, confidence: float = 0.95
) -> Moves:
    """Second minus first, of the same samples in the same order; both know their samples."""
    assert first.of_samples is not None
    assert second.of_samples is not None
    differences: dict[str, Floats] = {}
    for block, of_first in first.of_samples.items():
        values = second.values[block] - first.values[block]
        apart = second.of_samples[block] - of_first
        differences[block] = np.where(_is_rounding(values, first, second, block)[..., None], 0.0 * apart, apart)
    tested = mean_tests(differences, first.samples, num_draws=num_draws, seed=seed, confidence=confidence)
    return {
        block: {"difference": second.values[block] - first.values[block], **_without_change(arrays)}
        for block, arrays in tested.items()
    }


def _without_change(arrays: dict[str, Floats]) -> dict[str, Floats]:
    return {name: values for name, values in arrays.items() if name != "change"}


def _is_rounding(difference: Floats, first: SampleValues, second: SampleValues, block: str) -> npt.NDArray[np.bool_]:
    largest = max(float(np.nanmax(np.abs(run.values[block]), initial=0.0)) for run in (first, second))
    small: npt.NDArray[np.bool_] = np.abs(difference) <= ROUNDING * largest
    return small


def unpaired_moves(first: SampleValues, second: SampleValues, *, confidence: float = 0.95) -> Moves:
    """Second minus first, of other samples."""
    found: Moves = {}
    for block in first.values:
        one, other = first.estimate(block), second.estimate(block)
        assert one is not None
        assert other is not None
        found[block] = _apart(one, other, _is_rounding(other.value - one.value, first, second, block), confidence)
    num = sum(int(np.isfinite(arrays["p_value"]).sum()) for arrays in found.values())
    for arrays in found.values():
        arrays["q_value"] = q_values(arrays["p_value"], "bh")
        arrays["p_max"] = np.minimum(num * arrays["p_value"], 1.0)
    return found


def _apart(one: Estimate, other: Estimate, is_rounding: npt.NDArray[np.bool_], confidence: float) -> dict[str, Floats]:
    difference, variances = other.value - one.value, [run.standard_error**2 for run in (one, other)]
    total = variances[0] + variances[1]
    spread = variances[0] ** 2 / one.freedom + variances[1] ** 2 / other.freedom
    freedom = np.divide(total**2, spread, out=np.where(np.isnan(total), np.nan, 1.0), where=spread > 0)
    error = np.sqrt(total)
    z = np.divide(np.abs(difference), error, out=np.where(np.isnan(error), np.nan, 0.0), where=error > 0)
    z = np.where(is_rounding & ~np.isnan(z), 0.0, z)
    low, high = Estimate(difference, error, freedom).interval(confidence)
    p_value = np.where(np.isnan(z), np.nan, np.minimum(2 * student.sf(z, freedom), 1.0))
    return {"difference": difference, "standard_error": error, "ci_low": low, "ci_high": high, "p_value": p_value}


def moves(
    first: SampleValues, second: SampleValues, *, paired: bool, num_draws: int, seed: int = 0, confidence: float = 0.95
) -> Moves | None:
    """Paired as asked, or unpaired; None where a run does not know its errors."""
    if not can_be_tested(first, second):
        return None
    if paired:
        return paired_moves(first, second, num_draws=num_draws, seed=seed, confidence=confidence)
    return unpaired_moves(first, second, confidence=confidence)
