"""Real gradients for the study of effects: products of all pairs of samples in a head, from which any draw follows.

With S_ij = - g_i P g_j among a pool of samples, the influences of any choice of samples, in whatever role and with
whatever signs, are means of entries of S; their true changes are means over the whole pool.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pool import head_gradients, task_samples
from torch import Tensor

from qkov_dist.loading.models import LoadedModel

LAYERS, POOL, MAX_TOKENS = (4, 14, 24), 64, 48
RIDGE = 1e-3  # relative, the default
DrawOf = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def pair_products(loaded: LoadedModel, layers: tuple[int, ...] = LAYERS, num: int = POOL) -> np.ndarray:
    """S of every head [head, optimizer, 2 num, 2 num]: Python's samples first, then arithmetic's."""
    samples = [s for task in ("python", "arithmetic") for s in task_samples(loaded, task, num, MAX_TOKENS)]
    return np.stack([_products(gradients) for _, gradients in head_gradients(loaded.model, samples, layers)])


def _products(gradients: Tensor) -> np.ndarray:
    fisher = gradients.square().mean(0)
    regularised = fisher + RIDGE * fisher.mean()
    return np.stack([-((gradients * scale) @ gradients.T).double().numpy() for scale in (1.0, regularised.rsqrt())])


def real_draws(products: np.ndarray) -> dict[str, DrawOf]:
    """By name, what draws samples: ``size`` a task -> influences [head, optimizer, N] and true changes."""
    num = products.shape[-1] // 2
    code, other = products[..., :num, :num], products[..., :num, num:]
    among = code[..., ~np.eye(num, dtype=bool)].mean(-1)

    def signs(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs = _chosen(other, rng.permutation(num)[:size], rng.permutation(num)[:size])
        return _influences(pairs * rng.choice((-1.0, 1.0), size=(size, 1))), 0 * among

    def halves(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(num)
        return _influences(_chosen(code, order[:size], order[size : 2 * size])), among

    def tasks(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs = _chosen(other, rng.permutation(num)[:size], rng.permutation(num)[:size])
        return _influences(pairs), other.mean((-2, -1))

    return {"signs of A's samples at random": signs, "halves of Python": halves, "Python and arithmetic": tasks}


def _chosen(products: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    return products[..., rows[:, None], cols]


def _influences(pairs: np.ndarray) -> np.ndarray:
    return np.concatenate([pairs.mean(-1), pairs.mean(-2)], axis=-1)
