r"""What a head's elements add to effects of steps: one record from a tile to the file, which adds up.

With gbar_t the mean gradient of task t, F_t the mean of its squared gradients, and P = 1 (``sgd``) or R^(-1/2)
(``adam``), sums over a head's elements p:

    influence of sample n    - sum_p g_n P gbar_t, with t the task that n is not of
    curvature_a              1/2 sum_p F_a (P gbar_b)^2
    curvature_b              1/2 sum_p F_b (P gbar_a)^2
    own_a, own_b             - sum_p gbar_t P gbar_t
    norm_a, norm_b           sum_p F_t P, by which self-pairs are taken out of ``own``

A record is float64 [heads, optimizer, sums and N]: the sums first, then the influence of every sample.
``influence_sums`` forms it; what follows from it is ``results.influences``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

OPTIMIZERS = ("sgd", "adam")
SUMS = ("curvature_a", "curvature_b", "own_a", "own_b", "norm_a", "norm_b")

Influences = npt.NDArray[np.float64]


def no_influences(num_heads: int, num_samples: int | None = None) -> Influences:
    """Records of heads without any element; with None those of a run that leaves effects out, of nothing at all."""
    size = 0 if num_samples is None else len(SUMS) + num_samples
    return np.zeros((num_heads, len(OPTIMIZERS), size))


def sums_of(records: Influences, name: str) -> Influences:
    """One of the sums, [..., optimizer]."""
    return records[..., SUMS.index(name)]


def of_samples(records: Influences) -> Influences:
    """The influence of each sample, [..., optimizer, N]."""
    return records[..., len(SUMS) :]


def mean_weights(is_a: npt.NDArray[np.bool_], is_b: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Each sample's weight in the mean gradient of its task, [N], from which samples of A and of B count."""
    weights = is_a / max(int(is_a.sum()), 1) + is_b / max(int(is_b.sum()), 1)
    return np.asarray(weights, np.float64)
