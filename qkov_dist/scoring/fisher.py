r"""The diagonal empirical Fisher as a fixed weighted sum of per-sample squares.

With F_t = beta F_{t-1} + (1 - beta) mean_{i in batch t} g_i^2 and I = F_T / (1 - beta^T),

    I = sum_i w_i g_i^2,    w_i = (1 - beta) beta^{T-t} / (|batch t| (1 - beta^T))    for i in batch t,

so I depends on nothing but the order of the samples: not on compute batches, ranks or shards. The weights sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import Literal

import numpy as np

Estimator = Literal["ema", "mean"]
Scope = Literal["pooled", "a", "b"]
SCOPES = ("a", "b")  # of one task alone


def fisher_steps(sizes: Sequence[int], *, batch_size: int, scope: Scope) -> list[list[int]]:
    """Pooled sample numbers of each Fisher batch, in order: one task's samples behind another's.

    Batches of all tasks take turns until all are used up; with scope ``a`` or ``b`` (of two) only that task counts. A
    task's batches are of nearly equal size and no larger than ``batch_size``: every step has one weight, which its
    samples share, so that a last batch of one sample would give it the weight of a whole batch.
    """
    of_tasks = [_chunks(start, stop, batch_size) for start, stop in pairwise((0, *accumulate(sizes)))]
    if scope != "pooled":
        of_tasks = [of_tasks[SCOPES.index(scope)]]
    return [step for turn in zip_longest(*of_tasks) for step in turn if step is not None]


def fisher_weights(
    steps: Sequence[Sequence[int]], num_samples: int, *, estimator: Estimator, decay: float
) -> np.ndarray:
    """Each sample's weight in I, float64 [num_samples]; zero for samples in no step."""
    weights = np.zeros(num_samples)
    if estimator == "mean":
        for step in steps:
            weights[list(step)] += 1.0
        weights /= weights.sum()
        return weights
    total = len(steps)
    correction = -np.expm1(total * np.log(decay))
    for t, step in enumerate(steps, start=1):
        weights[list(step)] += (1.0 - decay) * decay ** (total - t) / (len(step) * correction)
    return weights


def by_task(weights: np.ndarray, task_of: Sequence[int] | np.ndarray, num_tasks: int = 2) -> np.ndarray:
    """Each task's weights, [tasks, num_samples], from all and the number of each sample's task; rows add up to all."""
    split: np.ndarray = weights * (np.asarray(task_of)[None] == np.arange(num_tasks)[:, None])
    return split


def _chunks(start: int, stop: int, size: int) -> list[list[int]]:
    num = -(-(stop - start) // size)
    cuts = [start + ((stop - start) * n + num - 1) // num for n in range(num + 1)] if num else [start]
    return [list(range(low, high)) for low, high in pairwise(cuts)]
