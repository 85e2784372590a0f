"""Top conflicts beyond scale: pairs of samples that score higher than the scales of the two samples explain.

A loud sample has large scores with every other one. Within one head, rows and columns explain

    expected_ij = (mean over j of |S_ij|) (mean over i of |S_ij|) / (mean of |S|),

over pairs of different samples, and a pair's excess is S_ij / expected_ij: 1 where scale explains all of it. A block's
pairs, each at the head where it exceeds most, are listed by excess, and no sample stands in more than a tenth of the
rows (or in as few as the number of samples allows).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

MOST_OF_ROWS = 10  # a sample stands in one of so many rows


def excess(scores: Floats) -> npt.NDArray[np.float64]:
    """Scores [..., n_a, n_b], NaN for pairs that do not count -> how many times what the samples' scales explain."""
    size = np.abs(scores.astype(np.float64))
    counts = np.isfinite(size)
    size = np.where(counts, size, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows, columns, overall = (
            size.sum(axis, keepdims=True) / counts.sum(axis, keepdims=True) for axis in (-1, -2, (-2, -1))
        )
        found: npt.NDArray[np.float64] = np.where(counts, scores, np.nan) * overall / (rows * columns)
    return np.where(np.isfinite(found), found, np.nan)


def strongest_heads(layers: Iterable[Floats]) -> tuple[npt.NDArray[np.float64], Ints, Ints]:
    """Of values [head, n_a, n_b], layer by layer: each pair's largest, its layer and its head, all [n_a, n_b]."""
    best: npt.NDArray[np.float64] | None = None
    for layer, values in enumerate(layers):
        filled = np.where(np.isnan(values), -np.inf, values)
        head = filled.argmax(axis=0)
        largest = np.take_along_axis(filled, head[None], axis=0)[0]
        if best is None:
            best, at_layer, at_head = largest, np.zeros(head.shape, np.int64), head
            continue
        higher = largest > best
        best = np.where(higher, largest, best)
        at_layer, at_head = np.where(higher, layer, at_layer), np.where(higher, head, at_head)
    if best is None:
        raise ValueError("no layers")
    return best, at_layer, at_head


def spread(values: Floats, count: int) -> list[tuple[int, int]]:
    """Places of the largest values [n_a, n_b], largest first, with no sample in more than its part of the rows."""
    most = max(count // MOST_OF_ROWS, -(-count // min(values.shape)))
    used_a, used_b = (np.zeros(num, np.int64) for num in values.shape)
    chosen: list[tuple[int, int]] = []
    for place in np.argsort(-values, axis=None, kind="stable"):
        i, j = (int(index) for index in np.unravel_index(place, values.shape))
        if len(chosen) == count or not np.isfinite(values[i, j]):
            break
        if used_a[i] < most and used_b[j] < most:
            used_a[i] += 1
            used_b[j] += 1
            chosen.append((i, j))
    return chosen
