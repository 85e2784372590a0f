r"""What a tile adds to effects of steps, formed while it is in cache; ``influence_records`` says what that is.

Beside scores of all pairs this takes two passes over the gradients: one for the mean gradients of the T tasks, one for
the product of each sample with the other tasks'. All else are inner products among a few vectors over the elements,

    F_t, squares of gbar_t, squares of R^(-1/2) gbar_t, R^(-1/2), 1,      and   gbar_t, R^(-1/2) gbar_t,

which are rows of one buffer in this order, so that one product of the first 2 T with the 2 T + 2 from row T on has them
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qkov_dist.memory import moved

from .influence_records import num_sums, place_among_others


def num_vectors(num_tasks: int) -> int:
    """Vectors over a tile's elements that effects take."""
    return 5 * num_tasks + 2


def effect_products(num_samples: int, num_tasks: int = 2) -> int:
    """Products of an element's gradients that effects take: means, both optimizers' influences, sums."""
    return num_samples + 2 * (num_tasks - 1) * num_samples + 2 * num_tasks * (2 * num_tasks + 2)


@dataclass(frozen=True)
class MeanWeights:
    """How means over tasks are taken of members in the order of their gradients.

    Attributes:
        weights: Each sample's weight in the mean gradient of its task [n], task after task; members beyond n are in
            none.
        sizes: Samples of each of the T tasks.
        of_squares: What makes F of every task of the squares of members' gradients, [T, members].
        needs_squares: Whether F is no multiple of what its task adds to the Fisher, and has to be formed from squares.
        places: Which of the inner products the sums of a record are, [optimizer, sums] of [2 T (2 T + 2)].
        factors: What each is multiplied by, float64 [optimizer, sums].
    """

    weights: Tensor
    sizes: tuple[int, ...]
    of_squares: Tensor
    needs_squares: bool
    places: Tensor
    factors: Tensor

    @staticmethod
    def of(weights: Tensor, sizes: Sequence[int], fisher_weights: Tensor) -> MeanWeights:
        """From the weights of means [n] and those of the Fisher, by task [T, members]."""
        of_squares = weights.new_zeros(fisher_weights.shape)
        for task, part in enumerate(parts_of(sizes)):
            of_squares[task, part] = weights[part]
        scale = of_squares.sum(1) / fisher_weights.sum(1)
        same = torch.allclose(scale[:, None] * fisher_weights, of_squares, rtol=1e-6)
        places, factors = _sums(len(sizes), scale if same else torch.ones_like(scale))
        return MeanWeights(weights, tuple(sizes), of_squares, not same, places, factors)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> MeanWeights:
        """The same where gradients are, and in their type."""
        weights, of_squares = (moved(values, device, dtype) for values in (self.weights, self.of_squares))
        places, factors = moved(self.places, device), moved(self.factors, device)
        return replace(self, weights=weights, of_squares=of_squares, places=places, factors=factors)


def _sums(num_tasks: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Which inner products (row, column) the sums of a record are, by optimizer, and their factors.

    Args:
        num_tasks: T.
        scale: What makes F of each task of the row that is kept of it, [T].
    """
    num, width = num_tasks, 2 * num_tasks + 2
    places = torch.empty(2, num_sums(num), dtype=torch.int64)
    factors = scale.new_full((2, num_sums(num)), -1.0)  # of ``own``; norms and curvatures follow
    for optimizer, (first, norm) in enumerate(((0, 2 * num + 1), (num, 2 * num))):  # of squares of steps; 1 or root
        for task in range(num):
            for other in (other for other in range(num) if other != task):
                at = task * (num - 1) + place_among_others(task, other)
                places[optimizer, at] = task * width + first + other
                factors[optimizer, at] = 0.5 * scale[task]
            places[optimizer, num * (num - 1) + task] = (num + task) * width + norm
            places[optimizer, num * num + task] = task * width + norm
            factors[optimizer, num * num + task] = scale[task]
    return places, factors


def parts_of(sizes: Sequence[int]) -> list[slice]:
    """Where each task's samples are, one task behind another."""
    return [slice(start, stop) for start, stop in pairwise((0, *accumulate(sizes)))]


class InfluenceSums:
    """The sums of some heads, tile by tile.

    Args:
        means: How means are taken.
        num_heads: Heads that are worked on together.
    """

    def __init__(self, means: MeanWeights, num_heads: int) -> None:
        self.means, self._weights = means, means.weights
        self._parts = parts_of(means.sizes)
        self._samples = means.weights.new_zeros(2, num_heads, self.num_tasks - 1, len(means.weights))
        self._products = means.weights.new_zeros(num_heads, 2 * self.num_tasks, 2 * self.num_tasks + 2)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.means.sizes)

    @property
    def needs_squares(self) -> bool:
        """Whether F has to be formed from squares."""
        return self.means.needs_squares

    def add(self, gradients: Tensor, squares: Tensor | None, by_task: Tensor, inverse: Tensor, vectors: Tensor) -> None:
        """Add the elements of a tile of each head.

        Args:
            gradients: [members, heads * p].
            squares: Their squares; None where these are not needed.
            by_task: What each task adds to the Fisher, [T, heads * p].
            inverse: 1 / R [heads * p], finite: 0 where no sample has a gradient.
            vectors: A buffer [5 T + 2, heads * p].
        """
        num, first = self.num_tasks, 3 * self.num_tasks + 2
        of_squares, root, one = vectors[:num], vectors[3 * num], vectors[3 * num + 1]
        means, steps = vectors[first : first + num], vectors[first + num :]
        if squares is not None and self.needs_squares:
            torch.mm(self.means.of_squares, squares, out=of_squares)
        else:
            of_squares.copy_(by_task)
        for task, part in enumerate(self._parts):
            torch.mm(self._weights[part].unsqueeze(0), gradients[part], out=means[task : task + 1])
        torch.sqrt(inverse, out=root)
        torch.mul(means, root, out=steps)
        of_optimizers = vectors[first:].view(2, num, -1)
        for task, part in enumerate(self._parts):
            self._add_influences(task, part, gradients[part], of_optimizers)
        torch.mul(vectors[first:], vectors[first:], out=vectors[num : 3 * num])
        one.fill_(1.0)
        self._add_products(vectors[: 2 * num], vectors[num : 3 * num + 2])

    def add_formed(self, products: Tensor, of_samples: Tensor) -> None:
        """Add what is formed of the elements of heads.

        Args:
            products: Of the vectors, [heads, 2 T, 2 T + 2].
            of_samples: Of every sample, and maybe more, with each task's mean and step: [heads, optimizer, T, n or
                more].
        """
        taken = of_samples.transpose(0, 1)
        for task, part in enumerate(self._parts):
            self._samples[:, :, :task, part] -= taken[:, :, :task, part]
            self._samples[:, :, task:, part] -= taken[:, :, task + 1 :, part]
        self._products += products

    def _add_influences(self, task: int, part: slice, gradients: Tensor, steps: Tensor) -> None:
        """Add a task's samples [n, heads * p] along the steps [2, T, heads * p] of the other tasks."""
        num, heads = self.num_tasks, self._samples.shape[1]
        if num == 2 and heads == 1:  # both optimizers in one pass
            self._samples[:, 0, 0, part].addmm_(steps[:, 1 - task], gradients.t(), alpha=-1)
            return
        before, after = slice(0, task), slice(task, num - 1)  # among the task's others
        for optimizer, of_steps in enumerate(steps):
            self._add_samples(self._samples[optimizer, :, before, part], gradients, of_steps[:task])
            self._add_samples(self._samples[optimizer, :, after, part], gradients, of_steps[task + 1 :])

    def _add_samples(self, samples: Tensor, gradients: Tensor, steps: Tensor) -> None:
        """Take from influences [heads, k, n] the products of gradients [n, heads * p] and k steps [k, heads * p]."""
        heads, num_steps = samples.shape[:2]
        if not num_steps:
            return
        if heads == 1 and num_steps == 1:
            samples[0, 0].addmv_(gradients, steps[0], alpha=-1)
        elif heads == 1:
            samples[0].addmm_(steps, gradients.t(), alpha=-1)
        else:
            of_heads = gradients.view(len(gradients), heads, -1).transpose(0, 1)
            samples -= torch.bmm(of_heads, steps.view(num_steps, heads, -1).permute(1, 2, 0)).mT

    def _add_products(self, left: Tensor, right: Tensor) -> None:
        heads = len(self._products)
        if heads == 1:
            self._products[0].addmm_(left, right.t())
            return
        of_heads = (rows.view(len(rows), heads, -1).transpose(0, 1) for rows in (left, right))
        rows, columns = of_heads
        self._products.baddbmm_(rows, columns.mT)

    def records(self) -> Tensor:
        """float64 [heads, optimizer, sums and influences] in the order of the gradients, where these are."""
        sums = self._products.double().flatten(1)[:, self.means.places] * self.means.factors
        return torch.cat([sums, self._samples.double().transpose(0, 1).flatten(2)], dim=2)
