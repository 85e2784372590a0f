"""What a tile adds to effects of steps, formed while it is in cache; ``influence_records`` says what that is.

Beside scores of all pairs this takes two passes over the gradients: one for the mean gradients of both tasks, one for
the product of each sample with the other task's. All else are inner products among a few vectors over the elements,

    F_a, F_b, gbar_a, gbar_b, R^(-1/2) gbar_a, R^(-1/2) gbar_b, the squares of these four, R^(-1/2), 1,

which are rows of one buffer, so that one product has them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .influence_records import SUMS

_F, _MEANS, _STEPS, _SQUARES, _ROOT, _ONE = slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 10), 10, 11
NUM_VECTORS = 12


def effect_products(num_samples: int) -> int:
    """Products of an element's gradients that effects take: means, both optimizers' influences, sums."""
    return 3 * num_samples + NUM_VECTORS**2


@dataclass(frozen=True)
class MeanWeights:
    """How means over tasks are taken of members in the order of their gradients.

    Attributes:
        weights: Each sample's weight in the mean gradient of its task [n], A's first; members beyond n are in none.
        num_a: A's samples.
        of_squares: What makes F of both tasks of the squares of members' gradients, [2, members].
        of_fisher: F of each task as a multiple of what it adds to the Fisher, [2]; None where it is no multiple.
    """

    weights: Tensor
    num_a: int
    of_squares: Tensor
    of_fisher: Tensor | None

    @staticmethod
    def of(weights: Tensor, num_a: int, fisher_weights: Tensor) -> MeanWeights:
        """From the weights of means [n] and those of the Fisher, by task [2, members]."""
        of_squares = weights.new_zeros(fisher_weights.shape)
        of_squares[0, :num_a] = weights[:num_a]
        of_squares[1, num_a : len(weights)] = weights[num_a:]
        scale = of_squares.sum(1) / fisher_weights.sum(1)
        same = torch.allclose(scale[:, None] * fisher_weights, of_squares, rtol=1e-6)
        return MeanWeights(weights, num_a, of_squares, scale if same else None)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> MeanWeights:
        """The same where gradients are, and in their type."""
        weights, of_squares = self.weights.to(device, dtype), self.of_squares.to(device, dtype)
        scale = None if self.of_fisher is None else self.of_fisher.to(device, dtype)
        return MeanWeights(weights, self.num_a, of_squares, scale)


class InfluenceSums:
    """The sums of some heads, tile by tile.

    Args:
        means: How means are taken.
        num_heads: Heads that are worked on together.
    """

    def __init__(self, means: MeanWeights, num_heads: int) -> None:
        self.means, self._weights = means, means.weights
        self._parts = slice(0, means.num_a), slice(means.num_a, len(means.weights))
        self._samples = means.weights.new_zeros(2, num_heads, len(means.weights))
        self._products = means.weights.new_zeros(num_heads, NUM_VECTORS, NUM_VECTORS)

    @property
    def needs_squares(self) -> bool:
        """Whether F has to be formed from squares."""
        return self.means.of_fisher is None

    def add(self, gradients: Tensor, squares: Tensor | None, by_task: Tensor, inverse: Tensor, vectors: Tensor) -> None:
        """Add the elements of a tile of each head.

        Args:
            gradients: [members, heads * p].
            squares: Their squares; None where these are not needed.
            by_task: What each task adds to the Fisher, [2, heads * p].
            inverse: 1 / R [heads * p], finite: 0 where no sample has a gradient.
            vectors: A buffer [12, heads * p].
        """
        if squares is not None and self.needs_squares:
            torch.mm(self.means.of_squares, squares, out=vectors[_F])
        else:
            vectors[_F].copy_(by_task)
        means, steps = vectors[_MEANS], vectors[_STEPS]
        for task, part in enumerate(self._parts):
            torch.mv(gradients[part].t(), self._weights[part], out=means[task])
        torch.sqrt(inverse, out=vectors[_ROOT])
        torch.mul(means, vectors[_ROOT], out=steps)
        torch.mul(vectors[2:6], vectors[2:6], out=vectors[_SQUARES])
        vectors[_ONE].fill_(1.0)
        for optimizer, of_step in enumerate((means, steps)):
            for task, part in enumerate(self._parts):
                self._add_samples(optimizer, part, gradients[part], of_step[1 - task])
        self._add_products(vectors)

    def _add_samples(self, optimizer: int, part: slice, gradients: Tensor, step: Tensor) -> None:
        """Take from samples' influences the product of gradients [n, heads * p] and a step [heads * p]."""
        heads = len(self._products)
        if heads == 1:
            self._samples[optimizer, 0, part].addmv_(gradients, step, alpha=-1)
            return
        of_heads = gradients.view(len(gradients), heads, -1).transpose(0, 1)
        self._samples[optimizer, :, part] -= torch.bmm(of_heads, step.view(heads, -1, 1)).squeeze(2)

    def _add_products(self, vectors: Tensor) -> None:
        heads = len(self._products)
        if heads == 1:
            self._products[0].addmm_(vectors, vectors.t())
            return
        of_heads = vectors.view(NUM_VECTORS, heads, -1).transpose(0, 1)
        self._products.baddbmm_(of_heads, of_heads.mT)

    def records(self) -> Tensor:
        """float64 [heads, optimizer, sums and n] in the order of the gradients, on the CPU."""
        products = self._products.double().cpu()
        if self.means.of_fisher is not None:
            scale = self.means.of_fisher.double().cpu()
            products[:, _F] *= scale[:, None]
        sums = products.new_empty(len(products), 2, len(SUMS))
        for place, norm in enumerate((_ONE, _ROOT)):
            squares, step = 6 + 2 * place, 2 + 2 * place
            for task in (0, 1):
                sums[:, place, task] = 0.5 * products[:, task, squares + 1 - task]
                sums[:, place, 2 + task] = -products[:, 2 + task, step + task]
                sums[:, place, 4 + task] = products[:, task, norm]
        return torch.cat([sums, self._samples.double().cpu().transpose(0, 1)], dim=2)
