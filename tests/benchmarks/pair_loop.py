"""The loop that early notes on this metric describe: pair by pair, layer by layer, head by head, block by block.

It is given the per-sample gradients and the Fisher, in memory, and slices them: its time is that of the scores alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradients import autograd_loop
from material import Subject
from torch import Tensor

RIDGE = 1e-8

Gradients = Mapping[str, Tensor]  # projection -> [out, in]


@dataclass(frozen=True)
class Head:
    """A native head of a block: a rectangle of a projection's weight."""

    layer: int
    block: str
    head: int
    module: str
    rows: slice
    cols: slice


def heads_of(subject: Subject) -> list[Head]:
    """Every head, layer by layer."""
    return [
        Head(layer.index, piece.block, piece.head, projection.module, piece.rect.rows, piece.rect.cols)
        for layer in subject.layout.layers
        for projection in layer.projections
        for piece in projection.slices
    ]


def kept_gradients(subject: Subject) -> list[Gradients]:
    """The gradients of all samples, materialized: A's, then B's."""
    return [{name: g[0] for name, g in found.items()} for _, found in autograd_loop(subject)]


def mean_fisher(gradients: Sequence[Gradients]) -> Gradients:
    """The mean of squared gradients."""
    return {name: sum(g[name].square() for g in gradients) / len(gradients) for name in gradients[0]}


def per_pair_loop(
    of_a: Sequence[Gradients], of_b: Sequence[Gradients], fisher: Gradients, heads: Sequence[Head]
) -> dict[tuple[int, int, int, str, int], float]:
    """sum g_i^2 / (I + lambda) |g_j| for every pair and head: (i, j, layer, block, head) -> score."""
    scores = {}
    for i, left in enumerate(of_a):
        for j, right in enumerate(of_b):
            for head in heads:
                g_i = left[head.module][head.rows, head.cols]
                g_j = right[head.module][head.rows, head.cols]
                weight = fisher[head.module][head.rows, head.cols] + RIDGE
                scores[i, j, head.layer, head.block, head.head] = (g_i.square() / weight * g_j.abs()).sum().item()
    return scores
