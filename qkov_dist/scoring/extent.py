"""What is scored, and in which numbers: derived from a configuration here, for a run as for its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qkov_dist.config import RunConfig
from qkov_dist.distributed.ownership import Owned
from qkov_dist.layout.heads import Layout

from .settings import DTYPES
from .tiles import Selection, TilePlan, make_tile_plan, tile_bytes


@dataclass(frozen=True)
class Scoring:
    """What is scored, and in which numbers.

    Attributes:
        selection: Layers and heads.
        include_bias: Whether biases count.
        num_samples: Samples whose gradients a tile holds.
        itemsize: Bytes of a score.
        factor_itemsize: Bytes of a number of a captured factor.
        on_gpu: Whether heads are scored on a GPU.
    """

    selection: Selection
    include_bias: bool
    num_samples: int
    itemsize: int
    factor_itemsize: int
    on_gpu: bool = False

    @staticmethod
    def of(config: RunConfig, num_samples: int, *, model_itemsize: int, on_gpu: bool) -> Scoring:
        """What a configuration asks for, of a model whose weights have ``model_itemsize`` bytes a number."""
        factor_dtype = config.compute.factor_dtype
        return Scoring(
            Selection(config.metric.layers, config.metric.heads),
            config.metric.include_bias,
            num_samples,
            DTYPES[config.compute.score_dtype].itemsize,
            model_itemsize if factor_dtype == "auto" else getattr(torch, factor_dtype).itemsize,
            on_gpu,
        )

    @property
    def product_itemsize(self) -> int:
        """Bytes of a number of a factor as it is multiplied (``tile_gradients.product_dtype``)."""
        narrow = self.on_gpu and (self.factor_itemsize, self.itemsize) == (2, 4)
        return self.factor_itemsize if narrow else self.itemsize

    @property
    def tile_bytes(self) -> int:
        """Bytes of gradients that a tile may have."""
        return tile_bytes("cuda" if self.on_gpu else "cpu")

    @property
    def max_elements(self) -> int:
        """Elements that a tile may have."""
        return max(self.tile_bytes // (self.num_samples * self.itemsize), 1)

    def tile_plan(self, layout: Layout, owned: Owned | None, most_bytes: int | None = None) -> TilePlan:
        """The tiles of a rank, of at most ``most_bytes`` of gradients; by default as suits where they are formed."""
        return make_tile_plan(
            layout,
            self.selection,
            include_bias=self.include_bias,
            num_samples=self.num_samples,
            itemsize=self.itemsize,
            owned=owned,
            tile_bytes=self.tile_bytes if most_bytes is None else most_bytes,
        )


def sides(sizes: Sequence[int], *, pooled: bool) -> tuple[slice, slice]:
    """Samples in the role of i and of j, task after task of these sizes: A x B of two, or all x all where pooled."""
    num = sum(sizes)
    return (slice(0, num), slice(0, num)) if pooled else (slice(0, sizes[0]), slice(sizes[0], num))
