r"""The metric on tensors: what a tile of a weight contributes to the scores of every pair of samples.

A tile is a set of weight elements p. With per-sample gradients g [N, P], the Fisher I [P] and the regularised Fisher
R = max(I, epsilon) + lambda, every score is a matrix product of elementwise maps of g:

    interference   M_ij = sum_p (g_i^2 / R) |g_j|
    signed         M_ij = sum_p g_i g_j / R
    symmetric      M_ij = sum_p |g_i| |g_j| / R

Contributions of disjoint tiles add up, so nothing here needs to know which head, layer or rank a tile belongs to. The
two symmetric scores put 1/sqrt(R) on both sides, which makes M_AB and M_BA transposes of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Score = Literal["interference", "signed", "symmetric"]


@dataclass(frozen=True)
class FisherSums:
    """Additive summary of I over some elements (the minimum combines by minimum).

    Attributes:
        total: Sum of I.
        count: Number of elements.
        minimum: Smallest I.
        below_ridge: Number of elements whose I is smaller than lambda.
    """

    total: float
    count: int
    minimum: float
    below_ridge: int

    def __add__(self, other: FisherSums) -> FisherSums:
        return FisherSums(
            self.total + other.total,
            self.count + other.count,
            min(self.minimum, other.minimum),
            self.below_ridge + other.below_ridge,
        )


NO_ELEMENTS = FisherSums(0.0, 0, float("inf"), 0)


def sample_gradients(x: Tensor | None, d: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Per-sample gradients of a tile, D^T X of each sample's tokens.

    Args:
        x: Inputs at the tile's input features [tokens, cols], or None for a bias (an input of ones).
        d: Output gradients at the tile's output features [tokens, rows].
        spans: Each sample's tokens (start, stop), [N].

    Returns:
        Gradients [N, rows * cols], in the dtype of ``d``.
    """
    if x is None:
        return torch.stack([d[slice(*span)].sum(dim=0) for span in spans])
    gradients = d.new_empty(len(spans), d.shape[1], x.shape[1])
    for n, (start, stop) in enumerate(spans):
        torch.mm(d[start:stop].t(), x[start:stop], out=gradients[n])
    return gradients.view(len(spans), -1)


def diagonal_fisher(gradients: Tensor, weights: Tensor) -> Tensor:
    """I = sum_n w_n g_n^2 over a tile: [N, P], [N] -> [P]."""
    return weights @ gradients.square()


def fisher_sums(fisher: Tensor, ridge: float) -> FisherSums:
    """Summarise I over a tile, in float64."""
    return FisherSums(
        total=float(fisher.sum(dtype=torch.float64)),
        count=fisher.numel(),
        minimum=float(fisher.min()),
        below_ridge=int((fisher < ridge).sum()),
    )


def pair_scores(
    gradients: Tensor,
    fisher: Tensor,
    *,
    left: slice,
    right: slice,
    score: Score,
    epsilon: float,
    ridge: float,
) -> Tensor:
    """A tile's contribution to the scores of all pairs: [len(left), len(right)].

    Args:
        gradients: Per-sample gradients of the tile [N, P].
        fisher: I over the tile [P].
        left: Samples in the role of i.
        right: Samples in the role of j.
        score: Which score.
        epsilon: Floor of I.
        ridge: lambda, added to the floored I.
    """
    inverse = (fisher.clamp_min(epsilon) + ridge).reciprocal_()
    if score == "interference":
        return (gradients[left].square() * inverse) @ gradients[right].abs().t()
    scaled = gradients * inverse.sqrt_()
    scaled = scaled.abs_() if score == "symmetric" else scaled
    return scaled[left] @ scaled[right].t()
