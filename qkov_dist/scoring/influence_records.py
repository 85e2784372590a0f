r"""What a head's elements add to effects of steps: one record from a tile to the file, which adds up.

With gbar_t the mean gradient of task t, F_t the mean of its squared gradients, and P = 1 (``sgd``) or R^(-1/2)
(``adam``), sums over a head's elements p, for tasks t and u that differ:

    curvature of t by u         1/2 sum_p F_t (P gbar_u)^2
    own of t                    - sum_p gbar_t P gbar_t
    norm of t                   sum_p F_t P, by which self-pairs are taken out of ``own``
    influence of sample n by u  - sum_p g_n P gbar_u, with u a task that n is not of

A record of T tasks is float64 [heads, optimizer, T (T + 1) and (T - 1) N]: the sums, task by task, curvatures first
(of each t by all others in their order), then the influences of all samples, N by each one's first other task, N by the
second, and so on. That of two tasks has ``SUMS`` and N influences; ``of_pair`` takes it out of that of many.
``influence_sums`` forms it; what follows from it is ``results.influences``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

OPTIMIZERS = ("sgd", "adam")
SUMS = ("curvature_a", "curvature_b", "own_a", "own_b", "norm_a", "norm_b")

Influences = npt.NDArray[np.float64]


def num_sums(num_tasks: int) -> int:
    """Sums of a record: those of every ordered pair, and two of every task."""
    return num_tasks * (num_tasks + 1)


def no_influences(num_heads: int, num_samples: int | None = None, num_tasks: int = 2) -> Influences:
    """Records of heads without any element; with None those of a run that leaves effects out, of nothing at all."""
    size = 0 if num_samples is None else num_sums(num_tasks) + (num_tasks - 1) * num_samples
    return np.zeros((num_heads, len(OPTIMIZERS), size))


def sums_of(records: Influences, name: str) -> Influences:
    """One of the sums of two tasks, [..., optimizer]."""
    return records[..., SUMS.index(name)]


def of_samples(records: Influences) -> Influences:
    """The influence of each sample of two tasks, [..., optimizer, N]."""
    return records[..., len(SUMS) :]


def place_among_others(task: int, other: int) -> int:
    """Where another task is among all tasks but one."""
    return other if other < task else other - 1


def of_pair(records: Influences, sizes: Sequence[int], a: int, b: int) -> Influences:
    """The record of two of many tasks, [..., optimizer, sums and n_a + n_b].

    Args:
        records: [..., optimizer, sums and influences] of all tasks.
        sizes: Samples of each task.
        a: One of the tasks, by number.
        b: A later one.
    """
    num_tasks, starts = len(sizes), [0, *accumulate(sizes)]
    chosen = [task * (num_tasks - 1) + place_among_others(task, other) for task, other in ((a, b), (b, a))]
    of_tasks = num_tasks * (num_tasks - 1)
    chosen += [of_tasks + first + task for first in (0, num_tasks) for task in (a, b)]
    for task, other in ((a, b), (b, a)):
        first = num_sums(num_tasks) + place_among_others(task, other) * starts[-1]
        chosen += range(first + starts[task], first + starts[task + 1])
    return records[..., chosen]


def own_of(records: Influences, num_tasks: int, task: int) -> tuple[Influences, Influences]:
    """``own`` and ``norm`` of one task, [..., optimizer] each, from the record of many."""
    first = num_tasks * (num_tasks - 1) + task
    return records[..., first], records[..., first + num_tasks]


def mean_weights(counts: npt.NDArray[np.bool_], sizes: Sequence[int]) -> npt.NDArray[np.float64]:
    """Each sample's weight in the mean gradient of its task, [N], from which samples count, and each task's number."""
    starts = [0, *accumulate(sizes)]
    of_tasks = [counts[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return np.concatenate([of_task / max(int(of_task.sum()), 1) for of_task in of_tasks])
