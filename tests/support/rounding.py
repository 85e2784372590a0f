"""How far two runs of one job may differ: by the order of their sums, which is the machine's and the ranks' to choose.

One rounding is off by at most u = eps / 2 of what it rounds, evenly spread: u / sqrt(3) in the mean square. Along a sum
of n terms these add up as independent errors do, to sqrt(n / 3) u of the sum of the terms' magnitudes, and between two
orders of it to sqrt(2 n / 3) u. A bound is six times that (a normal error is beyond it once in 5e8).

A run is a chain of such sums: the matrix products of its passes, the gradient's sum over tokens, the score's over
elements. The errors of a score's elements are each their own: its factors g_i^2 |g_j| / I add no more than the chain.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from zoo import HEAD_DIM, HEADS, HIDDEN, LAYERS

SIGMAS = 6
WIDTHS = 6  # inner dims of a layer's products, of its hidden size: 1 of q, k or v, 2 of o, 1 into the mlp, 2 out of it
COUNTED = ("p_", "q_")  # statistics that count resamplings: one that rounding pushes over the observed value counts


def reordered(num_terms: float, dtype: torch.dtype = torch.float32) -> float:
    """The bound for two orders of one sum, as a share of the sum of its terms' magnitudes."""
    return SIGMAS * sqrt(2 * num_terms / 3) * torch.finfo(dtype).eps / 2


def passes(*, layers: int = LAYERS, hidden: int = HIDDEN, tokens: int = 12, elements: int = HEAD_DIM * HIDDEN) -> float:
    """The bound for two float32 runs whose passes differ (other batches, other ranks), of a block's largest score.

    Args:
        layers: Of the model; the defaults are the zoo's.
        hidden: Its width.
        tokens: Of the longest sample.
        elements: Of a head's slice of one weight.
    """
    forward = layers * (WIDTHS * hidden + HEAD_DIM + tokens) + hidden
    return reordered(2 * forward + tokens + elements)


PASSES = passes()  # of the zoo's models; 1.1e-5
SCORES = reordered(HEAD_DIM * HIDDEN)  # equal factors, scored in another order: a head's own sum
BLOCKS = reordered(HEADS * HEAD_DIM * HIDDEN)  # a sum over a whole block, as of the Fisher


def assert_same_fisher(found: dict, wanted: dict, bound: float = BLOCKS, *, elements: int = HEAD_DIM * HIDDEN) -> None:
    """What is known of a block's Fisher in two runs (key -> [layer, head]).

    Its least element is where a gradient cancels: off by ``bound`` of an ordinary one. An element at the ridge may be
    counted on either side.
    """
    assert found.keys() == wanted.keys()
    largest = float(np.nanmax(wanted["mean"]))
    for key, array in wanted.items():
        atol = {"min": bound * largest, "ridge_share": 1 / elements}.get(key, 0.0)
        np.testing.assert_allclose(found[key], array, rtol=bound, atol=atol, err_msg=key)


def assert_same_tests(found: dict, wanted: dict, name: str, bound: float = PASSES) -> None:
    """Statistics (key -> [layer, head]) of two runs whose scores differ by rounding.

    A mean of scores is off by ``bound`` of the largest one, the logarithm of means' ratio by ``bound``; what is in
    units of the null's standard deviation is off by that over the deviation.
    """
    assert found.keys() == wanted.keys()
    unit = 4 * bound * (1.0 if name == "overlap" else float(np.nanmax(np.abs(wanted["statistic"]))))
    deviation = float(np.nanmin(wanted["detectable"] / wanted["detectable_sd"]))
    for key, array in wanted.items():
        if key.startswith(COUNTED):
            atol = 0.1
        elif key in ("effect_size", "detectable_sd"):
            atol = unit / deviation * (1 + float(np.nanmax(np.abs(array))))
        else:
            atol = unit * (1 + float(np.nanmax(np.abs(wanted["effect_size"]))))
        np.testing.assert_allclose(found[key], array, rtol=0, atol=atol, err_msg=f"{name} {key}")
