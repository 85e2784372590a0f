"""The permutation test of single heads, in chunks of bounded memory, and its correction over many.

A head's test needs no other head; only the correction does. Several ranks may therefore each call ``head_tests`` on the
heads they hold with the same ``Design``; ``max_z`` is reduced by max, the rest is gathered by ``join``, and ``correct``
runs anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import false_discovery_control
from torch import Tensor

from . import permutation
from .permutation import Alternative

Floats = NDArray[np.float64]
Statistic = Literal["cross_mean", "overlap"]
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Design:
    """All that the tests of different heads share: drawn once, the same on every rank."""

    labels: permutation.Labels
    resamples: Tensor
    names: tuple[Statistic, ...]
    alternative: Alternative
    alpha: float
    power: float
    confidence: float


@dataclass(frozen=True)
class HeadTests:
    """One statistic of some heads.

    ``arrays`` hold one float64 number a head, NaN for absent heads; ``z`` and ``tolerance`` likewise, and are what a
    head's family-wise p-value needs beside ``max_z`` [P], the largest z of these heads under each labelling.
    """

    arrays: dict[str, Floats]
    z: Floats
    tolerance: Floats
    max_z: Floats


def head_tests(scores: Tensor, design: Design) -> dict[Statistic, HeadTests]:
    """Test at least one head, each by itself, in chunks of bounded memory; scores [heads, N, N], NaN where absent."""
    num_samples, num_columns = design.labels.a.shape
    num_columns = max(num_columns, design.resamples.shape[1])
    chunk = max(_CHUNK_BYTES // (8 * num_samples * num_columns), 1)
    parts = [_chunk_tests(part, design) for part in torch.split(scores, chunk)]
    return {name: join([part[name] for part in parts]) for name in design.names}


def _chunk_tests(scores: Tensor, design: Design) -> dict[Statistic, HeadTests]:
    with_overlap = "overlap" in design.names
    nulls = permutation.head_nulls(scores, design.labels, with_overlap=with_overlap)
    resampled = permutation.resampled_statistics(scores, design.resamples, design.labels.n_a, with_overlap=with_overlap)
    return {name: _statistic_tests(nulls[name], resampled[name], design) for name in design.names}


def _statistic_tests(null: permutation.Null, resampled: Tensor, design: Design) -> HeadTests:
    labels, alternative = design.labels, design.alternative
    z, tolerance = permutation.standardise(null, alternative)
    effect, sd = permutation.effect_size(null, labels.exhaustive)
    shift = permutation.detectable_shift(null, labels, alternative, design.alpha, design.power)
    ci_low, ci_high = permutation.percentile_interval(resampled, labels, design.confidence)
    arrays = {
        "statistic": null.values[..., 0],
        "p_value": permutation.count_p(z[..., 0], tolerance, z),
        "effect_size": effect,
        "ci_low": ci_low,
        "ci_high": ci_high,
        "detectable": shift,
        "detectable_sd": shift / sd,
    }
    return HeadTests(
        {key: value.numpy(force=True) for key, value in arrays.items()},
        z[..., 0].numpy(force=True),
        tolerance.numpy(force=True),
        permutation.max_over_heads(z).numpy(force=True),
    )


def join(parts: Sequence[HeadTests]) -> HeadTests:
    """The tests of all parts' heads, in order."""
    return HeadTests(
        {key: np.concatenate([part.arrays[key] for part in parts]) for key in parts[0].arrays},
        np.concatenate([part.z for part in parts]),
        np.concatenate([part.tolerance for part in parts]),
        family_max(parts),
    )


def family_max(parts: Iterable[HeadTests]) -> Floats:
    """The largest z [P] of any head of any part under each labelling."""
    largest: Floats = np.maximum.reduce([part.max_z for part in parts])
    return largest


def correct(tests: HeadTests, max_z: Floats) -> dict[str, Floats]:
    """Add q-values over one block's heads, and the family-wise p-value over all heads that ``max_z`` [P] covers."""
    z, tolerance, family = (torch.from_numpy(array) for array in (tests.z, tests.tolerance, max_z))
    return tests.arrays | {
        "q_value": _q_values(tests.arrays["p_value"], "bh"),
        "q_value_by": _q_values(tests.arrays["p_value"], "by"),
        "p_max": permutation.count_p(z, tolerance, family).numpy(),
    }


def _q_values(p_values: Floats, method: Literal["bh", "by"]) -> Floats:
    present = np.isfinite(p_values)
    q_values = np.full_like(p_values, np.nan)
    if present.any():
        q_values[present] = false_discovery_control(p_values[present], method=method)
    return q_values
