"""The metric on one tile, in place and in cache; :mod:`qkov_dist.score` says what it computes.

A tile's gradients [N, P] are formed by one batched product for each group of samples. They are then used up in chunks
of columns that stay in a core's cache: squared, summed into the Fisher, mapped in place, multiplied into the scores of
all pairs. Nothing of a tile's size is allocated; a worker keeps its buffers from tile to tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .factors import Whole, Window
from .groups import Group
from .score import Maps, Score

CHUNK_BYTES = 2 * 2**20  # of gradients; with their squares this is what a core's second-level cache holds, or nearly


@dataclass(frozen=True)
class Padded:
    """One group's factors at a projection: X [n, T, in] and D [n, T, out]; or its gradients, where these are kept."""

    group: Group
    x: Window
    d: Window
    whole: Whole | None = None

    def put_gradients(self, rows: slice, cols: slice, bias: bool, out: Tensor) -> None:
        """Form the gradients of a tile, [n, rows, cols], in ``out``."""
        if self.whole is not None:
            out.copy_(self.whole.bias(rows) if bias else self.whole.rect(rows, cols))
        elif bias:
            torch.sum(self.d.features(rows), dim=1, out=out.squeeze(2))
        else:
            torch.bmm(self.d.features(rows).transpose(1, 2), self.x.features(cols), out=out)


@dataclass
class Buffers:
    """One worker's memory, by what it is for; it grows to the largest tile and is used again."""

    held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A tensor of this shape with any content; the next one of this name takes its place."""
        size, held = shape[0] * shape[1], self.held.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype or held.device != like.device:
            held = self.held[name] = like.new_empty(size)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Rule:
    """The score and its regularisation, for one block of one layer.

    Attributes:
        score: Which score.
        epsilon: Floor of I.
        ridge: lambda.
        left: Samples in the role of i, in the order of the gradients' rows.
        right: Samples in the role of j.
        maps: The elementwise maps, compiled; None maps in place, chunk by chunk.
    """

    score: Score
    epsilon: float
    ridge: float
    left: slice
    right: slice
    maps: Maps | None = None


def tile_gradients(factors: Sequence[Padded], rows: slice, cols: slice, *, bias: bool, buffers: Buffers) -> Tensor:
    """Per-sample gradients D^T X of a tile, [N, rows * cols], in a buffer; of a bias, the sum of D over tokens."""
    height, width = rows.stop - rows.start, cols.stop - cols.start
    gradients = buffers.take("gradients", (factors[-1].group.last, height * width), factors[0].d.values)
    for padded in factors:
        out = gradients[padded.group.first : padded.group.last].view(-1, height, width)
        padded.put_gradients(rows, cols, bias, out)
    return gradients


def add_tile(scores: Tensor, gradients: Tensor, weights: Tensor, rule: Rule, buffers: Buffers) -> Tensor:
    """Add a tile's contribution to the scores of all pairs.

    Args:
        scores: [left, right], added to.
        gradients: Per-sample gradients [N, P]; used up.
        weights: Each sample's weight in the Fisher, by task [2, N].
        rule: The score.
        buffers: The worker's.

    Returns:
        What each task adds to the Fisher, [2, P].
    """
    num, size = gradients.shape
    by_task = gradients.new_empty(2, size)
    step = size if rule.maps else max(CHUNK_BYTES // (num * gradients.element_size()), 1)
    for start in range(0, size, step):
        part = gradients[:, start : start + step]
        squares = buffers.take("squares", (num, part.shape[1]), part)
        torch.mul(part, part, out=squares)
        of_tasks = by_task[:, start : start + step]
        torch.mm(weights, squares, out=of_tasks)
        inverse = of_tasks.sum(0).clamp_min_(rule.epsilon).add_(rule.ridge).reciprocal_()
        of_i, of_j = rule.maps(part, inverse, rule.score) if rule.maps else _mapped(part, squares, inverse, rule.score)
        scores.addmm_(of_i[rule.left], of_j[rule.right].t())
    return by_task


def _mapped(gradients: Tensor, squares: Tensor, inverse: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """:func:`qkov_dist.score.maps`, in place."""
    if score == "interference":
        return squares.mul_(inverse), gradients.abs_()
    gradients.mul_(inverse.sqrt_())
    if score == "symmetric":
        gradients.abs_()
    return gradients, gradients


def tile_flops(factors: Sequence[Padded], size: int, pairs: tuple[int, int], *, bias: bool) -> int:
    """Floating-point operations of the matrix products of a tile of ``size`` elements, padding included.

    Gradients that are kept were formed before.
    """
    num = factors[-1].group.last
    tokens = 0 if bias else sum((padded.group.last - padded.group.first) * padded.group.length for padded in factors)
    return 2 * size * (tokens + 2 * num + pairs[0] * pairs[1])
