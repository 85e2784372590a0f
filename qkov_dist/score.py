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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .errors import QkovError

Score = Literal["interference", "signed", "symmetric"]
Maps = Callable[[Tensor, Tensor, Score], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FisherSums:
    """Additive summary of I over some elements (the minimum combines by minimum).

    Attributes:
        total: Sum of I.
        from_a: The part of it that task A's samples contribute.
        count: Number of elements.
        minimum: Smallest I.
        below_ridge: Number of elements whose I is smaller than lambda.
    """

    total: float
    from_a: float
    count: int
    minimum: float
    below_ridge: int

    def __add__(self, other: FisherSums) -> FisherSums:
        return FisherSums(
            self.total + other.total,
            self.from_a + other.from_a,
            self.count + other.count,
            min(self.minimum, other.minimum),
            self.below_ridge + other.below_ridge,
        )


NO_ELEMENTS = FisherSums(0.0, 0.0, 0, float("inf"), 0)


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
    """What each task adds to I = sum_n w_n g_n^2 over a tile: [N, P], [2, N] -> [2, P]; I is the sum of both rows."""
    return weights @ gradients.square()


def fisher_sums(fisher: Tensor, by_task: Tensor, ridge: float) -> FisherSums:
    """Summarise I [P] and what each task adds to it [2, P] over a tile, in float64."""
    return FisherSums(
        total=float(fisher.sum(dtype=torch.float64)),
        from_a=float(by_task[0].sum(dtype=torch.float64)),
        count=fisher.numel(),
        minimum=float(fisher.min()),
        below_ridge=int((fisher < ridge).sum()),
    )


def maps(gradients: Tensor, inverse: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """The elementwise maps of g whose product is the score: for samples in the role of i, and of j.

    Args:
        gradients: Per-sample gradients [N, P].
        inverse: 1 / R [P].
        score: Which score.
    """
    if score == "interference":
        return gradients.square() * inverse, gradients.abs()
    scaled = gradients * inverse.sqrt()
    scaled = scaled.abs() if score == "symmetric" else scaled
    return scaled, scaled


@cache
def compiled_maps() -> Maps:
    """:func:`maps`, fused into one pass over the gradients by ``torch.compile``.

    Raises:
        QkovError: where nothing can be compiled here.
    """
    compiled: Maps = torch.compile(maps, dynamic=True)
    try:
        compiled(torch.ones(3, 5), torch.ones(5), "interference")
    except (RuntimeError, OSError) as error:
        raise QkovError(
            "compute.compile",
            expected="a working torch.compile (on CPUs it needs a C++ compiler)",
            got=str(error).splitlines()[0],
            remedy="Install a compiler, or set compute.compile=false.",
        ) from error
    return compiled


def pair_scores(
    gradients: Tensor,
    fisher: Tensor,
    *,
    left: slice,
    right: slice,
    score: Score,
    epsilon: float,
    ridge: float,
    maps: Maps = maps,
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
        maps: The elementwise maps, as they are or compiled.
    """
    inverse = (fisher.clamp_min(epsilon) + ridge).reciprocal_()
    of_i, of_j = maps(gradients, inverse, score)
    return of_i[left] @ of_j[right].t()
