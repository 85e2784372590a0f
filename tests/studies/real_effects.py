"""Real gradients for the study of effects: products of all pairs of samples in a head, from which any draw follows.

With S_ij = - g_i P g_j among a pool of samples, the influences of any choice of samples, in whatever role and with
whatever signs, are means of entries of S; their true changes are means over the whole pool.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from pool import pooled, task_samples
from torch import Tensor

from qkov_dist.layout.heads import Site
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.models import LoadedModel
from qkov_dist.scoring.score import sample_gradients

LAYERS, POOL, MAX_TOKENS = (4, 14, 24), 64, 48
RIDGE = 1e-3  # relative, the default
DrawOf = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def pair_products(loaded: LoadedModel, layers: tuple[int, ...] = LAYERS, num: int = POOL) -> np.ndarray:
    """S of every head [head, optimizer, 2 num, 2 num]: Python's samples first, then arithmetic's."""
    samples = [s for task in ("python", "arithmetic") for s in task_samples(loaded, task, num, MAX_TOKENS)]
    found = []
    with pooled(loaded.model, samples, layers) as pool, torch.no_grad():
        spans = [pool.store.spans[n] for n in range(len(samples))]
        for number in layers:
            for projection in resolve(loaded.model).layer(number).projections:
                site = Site(number, projection.module)
                x, d = pool.store.x(site), pool.store.d(site)
                for piece in projection.slices:
                    rect = piece.rect
                    found.append(_products(sample_gradients(x.features(rect.cols), d.features(rect.rows), spans)))
    return np.stack(found)


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
