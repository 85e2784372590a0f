"""One head of one block of one layer: which there are, where they lie, and steps that change nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS, HeadSlice, Projection
from qkov_dist.layout.weights import changed, region_of

from .examined_model import ExaminedModel


@dataclass(frozen=True)
class Target:
    """One head of one block of one layer, by the model's numbers."""

    layer: int
    block: str
    head: int


def every_target(examined: ExaminedModel) -> tuple[Target, ...]:
    """All native heads of the layers examined, by layer, block and head."""
    return tuple(
        Target(layer.index, block, head)
        for layer in examined.attention_layers
        for block in layer.blocks
        for head in layer.heads(block)
    )


def sample_targets(examined: ExaminedModel, count: int, seed: int) -> tuple[Target, ...]:
    """About ``count`` heads, as many of each block, spread over the layers examined; at random within a layer."""
    rng = np.random.default_rng(seed)
    targets: list[Target] = []
    per_block = -(-count // len(BLOCKS))
    for block in BLOCKS:
        layers = [layer for layer in examined.attention_layers if block in layer.blocks]
        left = {layer.index: rng.permutation(layer.heads(block)).tolist() for layer in layers}
        for place in range(min(per_block, sum(map(len, left.values())))):
            open_layers = [index for index in left if left[index]]
            index = open_layers[place % len(open_layers)]
            targets.append(Target(index, block, left[index].pop()))
    return tuple(sorted(targets, key=lambda target: (target.layer, BLOCKS.index(target.block), target.head)))


def pieces(examined: ExaminedModel, target: Target) -> list[tuple[Projection, HeadSlice]]:
    """The rectangles of a head, each with its projection."""
    return [
        (projection, piece)
        for projection in examined.layout.layer(target.layer).projections
        for piece in projection.slices
        if (piece.block, piece.head) == (target.block, target.head)
    ]


@contextmanager
def stepped(examined: ExaminedModel, target: Target, update: Tensor) -> Iterator[None]:
    """Subtract an update from a head's slice, its rectangles' elements one after another [P]; restore it exactly."""
    found = pieces(examined, target)
    parts = torch.split(update, [piece.rect.area for _, piece in found])
    with ExitStack() as stack:
        for (projection, piece), part in zip(found, parts, strict=True):
            region = region_of(examined.model.get_submodule(projection.module), projection, piece.rect)
            stack.enter_context(_subtracted(region, part.view(piece.rect.shape)))
        yield


def _subtracted(region: Tensor, update: Tensor) -> AbstractContextManager[None]:
    return changed([region], lambda place: place.sub_(update.to(place)))


def halves(count: int, seed: int, what: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Samples dealt into two halves by a seed, each in order; the first has one more of an odd number.

    Raises:
        QkovError: where a half has fewer than two samples, of which nothing can be said.
    """
    if count < 4:
        remedy = "Give more samples, or raise --samples."
        raise QkovError(what, expected="at least 4 samples: two in each half", got=str(count), remedy=remedy)
    order, middle = np.random.default_rng((seed, count)).permutation(count).tolist(), -(-count // 2)
    return tuple(sorted(order[:middle])), tuple(sorted(order[middle:]))


def refuse_unchangeable(examined: ExaminedModel) -> None:
    """That a step needs weights which it can change.

    Raises:
        QkovError: where the weights of the layers examined are quantized or sharded.
    """
    if not examined.all_plain():
        raise QkovError(
            "qkov validate",
            expected="weights that a step can change: dense and floating",
            got="quantized or sharded weights",
            remedy="Load the model with --dtype float32, in one process.",
        )
