r"""The metric on tensors: what a tile of a weight contributes to the scores of every pair of samples.

A tile is a set of weight elements p. With per-sample gradients g [N, P], the Fisher I [P] and the regularised Fisher
R = max(I, epsilon) + lambda, every score is a matrix product of elementwise maps of g (``score_kinds`` has the table):

    interference   M_ij = sum_p (g_i^2 / R) |g_j|
    signed         M_ij = sum_p g_i g_j / R
    symmetric      M_ij = sum_p |g_i| |g_j| / R
    curvature      M_ij = sum_p g_i^2 g_j^2 / R

A term with g = 0 is 0, also where R = 0: an element without any gradient adds nothing. Where R = 0 and some g is not 0
(a Fisher of one task alone does not see the other's) the score is infinite, and refused as such.

Contributions of disjoint tiles add up, so nothing here needs to know which head, layer or rank a tile belongs to.
Symmetric scores put 1/sqrt(R) on both sides, which makes M_AB and M_BA transposes of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby

import torch
from torch import Tensor

from qkov_dist.errors import QkovError

from .fisher_sums import FISHER_COLUMNS
from .score_kinds import KINDS, ElementMap, Score

MEANING = 3  # of what a run computes, as a number that grows when it changes: part of its id, so files never mix
COMPILED_FROM = 10**12  # elements of gradients: fewer are mapped in less time than compiling takes, on a GPU
NATIVE_FROM = 5 * 10**8  # the same of the native kernel, on a CPU
Fused = Callable[[Tensor, Tensor, Tensor, Score], tuple[Tensor, Tensor, Tensor]]
MAPS: Mapping[ElementMap, Callable[[Tensor], Tensor]] = {
    "gradient": lambda gradients: gradients,
    "magnitude": torch.abs,
    "square": torch.square,
}


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
    """What each task adds to I = sum_n w_n g_n^2 over a tile: [N, P], [T, N] -> [T, P]; I is the sum of rows."""
    return weights @ gradients.square()


def of_each_head(numbers: Sequence[float], like: Tensor) -> float | Tensor:
    """A number of some heads: one where it is that of all, else [heads, 1] where a tensor is, without a copy to it."""
    return numbers[0] if len({*numbers}) == 1 else _each(tuple(numbers), like.dtype, like.device)


@lru_cache(maxsize=64)
def _each(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    found, start = torch.empty(len(numbers), 1, dtype=dtype, device=device), 0
    for number, alike in groupby(numbers):
        stop = start + len([*alike])
        found[start:stop].fill_(number)
        start = stop
    return found


def regularised(fisher: Tensor, epsilon: float, ridges: Sequence[float]) -> Tensor:
    """R in place of I, [..., heads * p] of heads that have one lambda, or one each."""
    ridge = of_each_head(ridges, fisher)
    of_heads = fisher.view(*fisher.shape[:-1], len(ridges), -1) if isinstance(ridge, Tensor) else fisher
    of_heads.clamp_min_(epsilon).add_(ridge)
    return fisher


def fisher_sums(by_task: Tensor, least: Sequence[float]) -> Tensor:
    """Summarise I over the tiles of some heads from what each task adds to it, [T, heads, P], where they are.

    ``least`` is what I must exceed to have a say, of all heads or of each: the larger of epsilon and lambda.

    Returns:
        Records of ``scoring.fisher_sums``, float64 [heads, columns].
    """
    fisher = by_task.sum(0)
    found = {
        "sum": fisher.sum(1, dtype=torch.float64),
        "count": fisher.new_full((len(fisher),), fisher.shape[1], dtype=torch.float64),
        "min": fisher.amin(1).double(),
        "num_ridge_above": (fisher < of_each_head(least, fisher)).sum(1).double(),
    }
    of_tasks = [of_task.sum(1, dtype=torch.float64) for of_task in by_task[:-1]]
    return fisher_records(found, of_tasks)


def fisher_records(found: Mapping[str, Tensor], of_tasks: Sequence[Tensor]) -> Tensor:
    """Records of I from its columns by name, and what each task but the last adds to it: each float64 [heads]."""
    return torch.stack([*(found[name] for name in FISHER_COLUMNS if name in found), *of_tasks], dim=1)


def added_fisher_sums(one: Tensor, other: Tensor) -> Tensor:
    """Records of the same heads from those of other elements of theirs, where they are."""
    column = list(FISHER_COLUMNS).index("min")
    both = one + other
    torch.minimum(one[:, column], other[:, column], out=both[:, column])
    return both


def maps(gradients: Tensor, inverse: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """The elementwise maps of g whose product is the score: for samples in the role of i, and of j.

    Args:
        gradients: Per-sample gradients [N, P].
        inverse: 1 / R [P].
        score: Which score.
    """
    kind = KINDS[score]
    left = _product(MAPS[kind.left](gradients), power_of(inverse, kind.weight_power))
    return left, left if kind.is_symmetric else MAPS[kind.right](gradients)


def power_of(values: Tensor, power: float) -> Tensor:
    """A power of numbers of at least 0; the first is the numbers themselves."""
    if power == 1.0:
        return values
    return values.sqrt() if power == 0.5 else values.pow(power)


def mirror(scores: Tensor) -> None:
    """Complete symmetric scores [..., N, N] from what is on and above the diagonal."""
    scores.copy_(scores.triu() + scores.triu(1).mT)


def _product(values: Tensor, factor: Tensor) -> Tensor:
    """The product, 0 where a value is 0 though its factor is infinite."""
    return torch.where(values == 0, values, values * factor)


def fisher_and_maps(gradients: Tensor, weights: Tensor, floor: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's Fisher and maps as one expression, for a compiler to fuse.

    Args:
        gradients: Per-sample gradients [N, P].
        weights: Each sample's weight in the Fisher, by task [T, N].
        floor: epsilon and lambda at each element, [2, P].
        score: Which score.

    Returns:
        What each task adds to I, [T, P], and the maps for samples in the role of i, and of j, [N, P].
    """
    squares = gradients.square()
    by_task = torch.stack([(of_task.unsqueeze(1) * squares).sum(0) for of_task in weights])
    inverse = (torch.maximum(by_task.sum(0), floor[0]) + floor[1]).reciprocal()
    return (by_task, *maps(gradients, inverse, score))


def worth_compiling(elements: int, *, on_gpu: bool) -> bool:
    """Whether compiling saves more than the seconds that it takes: the elementwise part on a GPU, all on a CPU.

    Args:
        elements: Elements of all gradients that this process forms.
        on_gpu: Where it forms them.
    """
    return elements >= (COMPILED_FROM if on_gpu else NATIVE_FROM)


@cache
def compiled(device: str) -> Fused:
    """:func:`fisher_and_maps`, fused into two passes over the gradients by ``torch.compile``.

    Args:
        device: The type of device to compile for, such as ``cuda``.

    Raises:
        QkovError: where nothing can be compiled here.
    """
    fused: Fused = torch.compile(fisher_and_maps, dynamic=True)
    ones = torch.ones(3, 5, device=device)
    try:
        fused(ones, ones.new_ones(2, 3), ones.new_ones(2, 5), next(iter(KINDS)))
    except (RuntimeError, OSError) as error:
        raise QkovError(
            "compute.compile",
            expected="a working torch.compile (on CPUs it needs a C++ compiler)",
            got=str(error).splitlines()[0],
            remedy="Install a compiler, or set compute.compile=false.",
        ) from error
    return fused


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
    of_i, of_j = maps(gradients, inverse, score)
    return of_i[left] @ of_j[right].t()
